"""Settings that cannot work, for tests/soak/bad_inputs.py."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator

from bad_input_case import Case

from ovr_megatron.config import ColdStartConfig, RLConfig
from ovr_megatron.curation.settings import PrepareConfig

COLD_START = ("-m", "ovr_megatron.coldstart", "--config-name", "tiny_cold_start", "run.dir={tmp}/run")
COLD_START += ("model.path={model}", "steps=1")
RL = ("-m", "ovr_megatron.rl", "--config-name", "tiny_rl", "run.dir={tmp}/run", "model.path={model}", "iterations=1")
RL += ("prompts=4", "responses=2")
PREPARE = ("tools/prepare_data.py", "--config-name", "prepare_tiny", "dir={tmp}/prepared", "model={model}")
PREPARE += ("proxy_loss.model={model}",)

# A number that means something: a reward below zero, no top-k, a seed of any size.
MAY_BE_NEGATIVE = {"algorithm.wrong_reward"}
MAY_BE_LARGE = {
    *("run.seed", "seed", "run.keep_every", "run.keep_last", "run.log_every", "run.hang_timeout_s", "run.peak_tflops"),
    *("run.spike_deviations", "data.expected_samples", "optimizer.skip_above"),
}


def numbers(schema: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Yield the dotted key and the type of every number below a dataclass."""
    for name, hint in typing.get_type_hints(schema).items():
        key = f"{prefix}{name}"
        if dataclasses.is_dataclass(hint):
            yield from numbers(hint, f"{key}.")
        elif hint in (int, float):
            yield key, hint


def numeric_cases(schema: type, command: tuple[str, ...], area: str, skip: frozenset[str]) -> Iterator[Case]:
    """Yield what no number may be: not a number, not finite, a text, and mostly a negative one."""
    for index, (key, kind) in enumerate(numbers(schema)):
        if key.split(".")[0] in skip:
            continue
        name = key.rpartition(".")[2]
        yield Case(area, f"{key} is not a number", (*command, f"{key}=nan"), name)
        if kind is float:
            yield Case(area, f"{key} is infinite", (*command, f"{key}=inf"), name)
        if index % 3 == 0:
            yield Case(area, f"{key} is a text", (*command, f"{key}=abc"), name)
        if key not in MAY_BE_NEGATIVE:
            yield Case(area, f"{key} is negative", (*command, f"{key}=-1"), name)


LARGE = (
    *("data.pack_tokens", "data.max_prompt_tokens", "data.max_images", "data.max_frames", "data.max_pixels"),
    *("packs_per_step", "parallel.tp", "parallel.cp", "parallel.pp", "rollout.max_num_seqs", "rollout.max_model_len"),
    *("evaluation.max_tokens", "run.threads", "run.spike_window", "optimizer.warmup_steps"),
)

COLD_START_CASES = {
    "an unknown key": ("run.sed=3", "sed"),
    "an unknown group": ("rum.dir=x", "rum"),
    "a missing value": ("model.path=???", "model.path"),
    "a list for a choice": ("optimizer.schedule=[a,b]", "schedule"),
    "a text for a mapping": ("data=abc", "data"),
    "an override without a value": ("run.seed", "run.seed"),
    "an override of brackets": ("data.sources=[{path: a", "data.sources"),
    "an unknown interpolation": ("run.dir=${nothing}", "nothing"),
    "an unknown resolver": ("run.dir=${magic:1}", "magic"),
    "an environment variable that is not set": ("run.dir=${oc.env:NOT_SET_ANYWHERE}", "NOT_SET_ANYWHERE"),
    "an unknown schedule": ("optimizer.schedule=cosin", "cosine"),
    "an unknown dtype": ("model.dtype=float16", "bfloat16"),
    "an unknown recomputation": ("model.recompute=all", "selective"),
    "an unknown kind of layers": ("model.layers=apex", "local"),
    "fp8 in float32": ("model.fp8=current", "fp8"),
    "an unknown template": ("data.template=chatml", "template"),
    "an unknown on_error": ("data.on_error=ignore", "on_error"),
    "a beta of 1": ("optimizer.beta1=1", "beta"),
    "no steps and no set": ("steps=0", "steps"),
    "pixels the wrong way round": ("data.min_pixels=100000", "min_pixels"),
    "sequence parallelism without tp": ("parallel.sequence_parallel=true", "sequence_parallel"),
    "vpp without pp": ("parallel.vpp=2", "vpp"),
    "first stage without pp": ("parallel.first_stage_layers=1", "first_stage_layers"),
    "a tp that does not divide": ("parallel.tp=3", "tp=3"),
    "export out of step": ("run.export_every=7 run.save_every=5", "export_every"),
    "an evaluation of nothing": ("evaluation.every=1", "evaluation"),
    "everything frozen": ("model.freeze_language=true", "freeze"),
    "a run folder that is a file": ("run.dir={rows}", "rows.jsonl"),
    "a run folder without permission": ("run.dir=/proc/run", "/proc"),
    "a model that is not there": ("model.path={tmp}/absent", "absent"),
    "a model that is a file": ("model.path={rows}", "rows.jsonl"),
    "a model folder that is empty": ("model.path={tmp}", "config.json"),
    "an empty model path": ("model.path=", "model.path"),
    "an empty run folder": ("run.dir=", "run.dir"),
    "an empty path of a source": ("data.sources=[{path: ''}]", "data.sources[0].path"),
    "an empty tokenised set": ("data.tokenised=''", "data.tokenised"),
    "no sources": ("data.sources=[]", "data.sources"),
    "a source without a path": ("data.sources=[{weight: 1}]", "path"),
    "an unknown field of a source": ("data.sources=[{path: {rows}, wieght: 2}]", "wieght"),
    "a weight of 0": ("data.sources=[{path: {rows}, weight: 0}]", "weight"),
    "a weight that is not finite": ("data.sources=[{path: {rows}, weight: inf}]", "weight"),
    "a weight that is nan": ("data.sources=[{path: {rows}, weight: nan}]", "weight"),
    "an unknown format": ("data.sources=[{path: {rows}, format: csv}]", "format"),
    "an unknown puzzle": ("data.sources=[{path: 'puzzle:chess'}]", "puzzle"),
    "an unknown option of a puzzle": ("data.sources=[{path: 'puzzle:digits?colour=red'}]", "colour"),
    "a set and sources": ("data.tokenised={set}", "data.tokenised"),
    "the weights of an optimizer": ("optimizer.lr=[1]", "lr"),
    "steps with a fraction": ("steps=1.5", "steps"),
    "a truth value that is none": ("run.async_save=perhaps", "async_save"),
}

RL_CASES = {
    "an unknown estimator": ("algorithm.estimator=ppo", "gae"),
    "an estimator whose module is not there": ("algorithm.estimator=no.such:ROW", "no.such"),
    "an estimator that is none": ("algorithm.estimator=json:dumps", "Estimator"),
    "an unknown loss": ("algorithm.loss=clipped", "clip, gspo"),
    "a loss that is none": ("algorithm.loss=json:__name__", "function"),
    "an unknown reduction": ("algorithm.reduction=mean", "token"),
    "an unknown form of the divergence": ("algorithm.kl_form=k4", "kl_form"),
    "a clip of 1": ("algorithm.clip=1", "clip"),
    "a lambda above 1": ("algorithm.lam=1.5", "lam"),
    "a gamma of 0": ("algorithm.gamma=0", "gamma"),
    "k1 in the loss": ("algorithm.kl_form=k1 algorithm.kl_coefficient=0.1", "k1"),
    "groups of one response": (
        "algorithm.estimator=grpo algorithm.critic_warmup_iterations=0 responses=1",
        "responses",
    ),
    "a critic's warm-up without a critic": ("algorithm.estimator=grpo", "critic_warmup_iterations"),
    "a buffer over the limit": ("algorithm.overlong_buffer=5000", "overlong_buffer"),
    "a divisor that nothing uses": ("algorithm.reduction_tokens=10", "reduction_tokens"),
    "a wrong reward that is right": ("algorithm.wrong_reward=1", "wrong_reward"),
    "no curriculum": ("curriculum=[]", "curriculum"),
    "a curriculum that falls": ("curriculum=[{until: 5, max_tokens: 99}, {until: 3, max_tokens: 99}]", "until"),
    "a curriculum that ends too early": ("iterations=2000", "curriculum"),
    "a limit below the prompts'": ("curriculum=[{until: 5, max_tokens: 40}]", "max_prompt_tokens"),
    "a limit past the model's positions": ("curriculum=[{until: 5, max_tokens: 100000}]", "positions"),
    "an unknown field of a stage": ("curriculum=[{until: 5, tokens: 128}]", "tokens"),
    "top-p below 1": ("rollout.top_p=0.9", "top_p"),
    "a temperature of 0": ("rollout.temperature=0", "temperature"),
    "an unknown rollout schedule": ("rollout.schedule=random", "schedule"),
    "an engine on more ranks than there are": ("rollout.tp=4", "rollout.tp"),
    "too few prompts for the critic's steps": ("prompts=1 responses=1", "critic_steps"),
    "an unknown rule": ("reward.rules={image: fuzzy}", "fuzzy"),
    "a rule of a source that is not there": ("reward.rules={pictures: exact}", "pictures"),
    "a rule that is a list": ("reward.rules=[exact]", "rules"),
    "a rule whose module is not there": ("reward.rules={image: 'no.such:thing'}", "no.such"),
    "a rule whose function is not there": ("reward.rules={image: 'json:thing'}", "thing"),
    "a numeric rule without a number": ("reward.rules={image: 'numeric:wide'}", "numeric"),
    "an unknown initialisation": ("critic.head_init=zeros", "head_init"),
    "a critic that is not there": ("critic.path={tmp}/absent", "absent"),
    "an empty path of a critic": ("critic.path=", "critic.path"),
    "everything frozen": ("model.freeze_vision=true model.freeze_merger=true model.freeze_language=true", "freeze"),
    "a critic's layout that does not divide": ("critic.parallel={tp: 3}", "tp=3"),
    "a reference that is not there": ("algorithm.kl_coefficient=0.1 algorithm.reference={tmp}/absent", "absent"),
    "training from nothing": ("only=train", "rollouts_from"),
    "training from an empty folder": ("only=train rollouts_from={tmp}", "rollouts"),
    "rollouts that nothing reads": ("rollouts_from={tmp}", "rollouts_from"),
    "an unknown half": ("only=sleep", "only"),
    "a reward that takes no memory": ("reward.memory_mib=10", "memory_mib"),
    "no time for a verdict": ("reward.timeout_s=0", "timeout_s"),
    "a key-value cache of -1": ("rollout.kv_cache_gib=-1", "kv_cache_gib"),
    "memory above all there is": ("rollout.gpu_memory_utilization=1.5", "gpu_memory_utilization"),
    "a supervised source": ("data.sources=[{path: {rows}}]", "answer"),
    "stop strings that are a number": ("rollout.stop=3", "stop"),
    "an empty stop string": ("rollout.stop=['']", "rollout.stop[0]"),
}

PREPARE_CASES = {
    "no stages": ("stages=[]", "stages"),
    "an unknown stage": ("stages=[collect,polish]", "polish"),
    "a stage twice": ("stages=[collect,dedup,dedup]", "twice"),
    "not from the beginning": ("stages=[dedup]", "collect"),
    "weighing without strata": ("stages=[collect,weigh]", "stratify"),
    "tokenising in the middle": ("stages=[collect,tokenise,dedup]", "tokenise"),
    "a pattern that is none": ("'patterns.drop={apology: \"(\"}'", "patterns.drop"),
    "a pattern of nothing": ("patterns.drop={apology: ''}", "patterns.drop.apology"),
    "an unknown language": ("patterns.language=tlh", "language"),
    "bands that do not divide": ("dedup.bands=7", "bands"),
    "a threshold above 1": ("dedup.threshold=2", "threshold"),
    "nothing to keep away from": ("decontaminate.sources=[]", "decontaminate.sources"),
    "an unknown field": ("collect.limits=3", "limits"),
    "a proxy that is not there": ("proxy_loss.model={tmp}/absent", "absent"),
    "rates the wrong way round": ("difficulty.low=0.9 difficulty.high=0.1", "difficulty"),
    "strata by an unknown measure": ("stratify.measure=taste", "measure"),
    "weights on one side of 1": ("weigh.min_weight=2", "weigh"),
    "a source that is not there": ("data.sources=[{path: {tmp}/absent.jsonl}]", "absent.jsonl"),
    "a folder that is not ours": ("dir={model}", "model"),
    "a folder that is a file": ("dir={rows}", "rows.jsonl"),
    "an empty folder": ("dir=", "dir is empty"),
}


def handwritten(table: dict[str, tuple[str, str]], command: tuple[str, ...], area: str) -> Iterator[Case]:
    """Yield the cases of one of the tables above; several overrides stand in one text, apart by spaces."""
    for name, (overrides, says) in table.items():
        words = re.split(r" (?=[\w.]+=)", overrides)
        yield Case(area, name, (*command, *(word.strip("'") for word in words)), says)


def cases() -> Iterator[Case]:
    """Yield every case of this file."""
    yield from numeric_cases(ColdStartConfig, COLD_START, "sft", frozenset())
    shared = frozenset(typing.get_type_hints(ColdStartConfig)) - {"optimizer"}
    yield from numeric_cases(RLConfig, RL, "rl", shared)
    training = frozenset({"data", "rollout", "reward"})
    yield from numeric_cases(PrepareConfig, PREPARE, "preparation", training)
    for key in LARGE:
        yield Case("sft", f"{key} is 10^12", (*COLD_START, f"{key}=1000000000000"), key.rpartition(".")[2])
    yield from handwritten(COLD_START_CASES, COLD_START, "sft")
    yield from handwritten(RL_CASES, RL, "rl")
    yield from handwritten(PREPARE_CASES, PREPARE, "preparation")
