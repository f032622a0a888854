"""Our side of ``ovr bench peers``: ``python -m benchmarks.peer_ours TASK FOLDER`` prints a JSON row.

The loops' own parts run with the rows of each step fixed: `StepTrainer` of ``ovr sft``, `iterate` of ``ovr rl``.  A
step lasts from the end of the step before to its own end: its data, its computation and its log.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from benchmarks.peer_task import (
    BETA2,
    MAX_PIXELS,
    MIN_PIXELS,
    MODEL,
    PACK_TOKENS,
    PROMPT_TOKENS,
    ROWS,
    RULE,
    PeerTask,
    StepClock,
    replayed_texts,
    score,
)
from benchmarks.subprocess_bench import BenchRow
from ovr_megatron.coldstart.step_trainer import StepTrainer
from ovr_megatron.config import ColdStartConfig, RLConfig, build, defaults
from ovr_megatron.data.best_fit import plan_packs
from ovr_megatron.data.packing import Pack, pack
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.schema import Row
from ovr_megatron.data.sources import open_source
from ovr_megatron.data.stream import RowStream
from ovr_megatron.engine import Engine
from ovr_megatron.ppo.batch import Response
from ovr_megatron.ppo.experience import Models
from ovr_megatron.ppo.iteration import Clock, iterate, learn
from ovr_megatron.ppo.prompts import Prompts, PromptStream
from ovr_megatron.ppo.rollouts import Rollout
from ovr_megatron.rl.serving import serve
from ovr_megatron.rl.setup import build_models, build_rollouts
from ovr_megatron.rl.training import RL
from ovr_megatron.runtime import distributed
from ovr_megatron.runtime.runlog import open_log
from ovr_megatron.weights.folder import WeightFolder

# The defaults of TRL 1.16: `vllm_importance_sampling_mode` and `vllm_importance_sampling_clip_max` of its GRPOConfig.
TRL_CORRECTION = {"correction": "sequence_mask", "correction_high": 3.0}
GRPO_PACK_TOKENS = 8192  # packs of 2048 are up to a tenth slower with the tiny model, and as fast with `30M`


class OrderedPacks:
    """Packs of the rows of each step, which are encoded when the step asks for them.

    Attributes:
        dropped: Rows left out: none.
        fill: Not measured here.
        replies: Not counted here.
    """

    dropped = 0
    fill = 1.0
    replies = (0, 0)

    def __init__(self, rows: list[Row], rows_per_step: int, processor: Processor) -> None:
        self._rows = rows
        self._rows_per_step = rows_per_step
        self._processor = processor

    def __next__(self) -> list[Pack]:
        """Return the packs of the next step."""
        rows = self._rows[: self._rows_per_step]
        self._rows = self._rows[self._rows_per_step :]
        samples = self._processor.encode(rows, generation=False)
        plan = plan_packs([len(sample) for sample in samples], PACK_TOKENS)
        packs = []
        for members in plan:
            packs.append(pack([samples[i] for i in members]))
        return packs

    def state(self) -> Mapping[str, Any]:
        """Return nothing: the benchmark does not resume."""
        return {}

    def load(self, state: Any, /) -> None:
        """Do nothing: the benchmark does not resume."""


def shared_settings(task: PeerTask, folder: Path) -> dict[str, Any]:
    """Return the settings that both stages have."""
    return {
        "run": {"dir": str(folder / "run"), "threads": task.threads, "trackers": ["jsonl"]},
        "model": {"path": str(folder / MODEL)},
        "optimizer": {"lr": task.learning_rate, "schedule": "constant", "warmup_steps": 0, "beta2": BETA2},
        "data": {
            "sources": [{"path": str(folder / ROWS), "name": "rows"}],
            "template": "model",
            "min_pixels": MIN_PIXELS,
            "max_pixels": MAX_PIXELS,
            "pack_tokens": PACK_TOKENS,
        },
    }


def compose(schema: type, values: dict[str, Any]) -> Any:
    """Return the settings of a stage: ``values`` over its defaults."""
    settings = OmegaConf.merge(defaults(schema), values)
    assert isinstance(settings, DictConfig)
    return build(schema, settings)


def read_rows(config: ColdStartConfig | RLConfig) -> list[Row]:
    """Return the rows in the order of the file."""
    source = open_source(config.data.sources[0])
    return [source[index] for index in range(len(source))]


def train_sft(task: PeerTask, folder: Path) -> BenchRow:
    """Take the steps of the cold start; return seconds, learned tokens and loss of each."""
    values = shared_settings(task, folder) | {"steps": task.step_count, "packs_per_step": 1}
    config: ColdStartConfig = compose(ColdStartConfig, values)
    world = distributed.start(config.parallel, config.run.seed, config.run.threads)
    processor = Processor(folder / MODEL, config.data)
    engine = Engine(processor.shape, config.model, config.parallel, world)
    engine.with_optimizer(config.optimizer, config.steps).load(WeightFolder(folder / MODEL))
    packs = OrderedPacks(read_rows(config), task.rows, processor)
    trainer = StepTrainer(config, engine, world, None)
    clock = StepClock()
    steps = []
    for step in range(config.steps):
        steps.append(trainer.train(step, packs, save_seconds=0.0))
        clock.end_step()
    trainer.close()
    return {
        **clock.columns(),
        "tokens": [step["count"] for step in steps],
        "losses": [step["loss"] for step in steps],
        "norms": [step["grad_norm"] for step in steps],
    }


def train_grpo(task: PeerTask, folder: Path) -> BenchRow:
    """Run the iterations of GRPO, or learn from replayed responses."""
    algorithm: dict[str, Any] = {"estimator": "dr_grpo", "reduction": "token"}
    if not task.replay:  # replayed responses have no probabilities
        algorithm |= TRL_CORRECTION
    values = shared_settings(task, folder)
    values["data"] |= {"max_prompt_tokens": PROMPT_TOKENS, "pack_tokens": GRPO_PACK_TOKENS}
    values |= {
        "iterations": task.step_count,
        "prompts": task.rows,
        "responses": task.responses,
        "share_prompts": True,
        "algorithm": algorithm,
        "curriculum": [{"until": 1000, "max_tokens": PROMPT_TOKENS + task.tokens}],
        "rollout": {
            "max_num_seqs": task.rows * task.responses,
            "enforce_eager": False,  # vLLM's default, as TRL has it
            **({"ranks": 1, "max_staleness": 1} if task.ahead else {}),
        },
        "reward": {"workers": 1, "rules": {"rows": RULE}},
    }
    config: RLConfig = compose(RLConfig, values)
    if task.ahead:
        return run_ahead(task, config)
    world = distributed.start(config.parallel, config.run.seed, config.run.threads)
    processor = Processor(folder / MODEL, config.data)
    models, _ = build_models(config, folder / MODEL, processor, world)
    rows = read_rows(config)
    if task.replay:
        return replay(task, models, rows)
    return run_iterations(task, folder, models, rows)


def replay(task: PeerTask, models: Models, rows: list[Row]) -> BenchRow:
    """Learn from `replayed_texts`; no id is banned, since TRL normalises over all of them."""
    models.policy.sample_from([], temperature=1.0)
    prompts = Prompts(rows[: task.rows], models.processor)
    rollout = Rollout(prompts, limit=GRPO_PACK_TOKENS)
    tokenizer = models.processor.tokenizer
    for index, text in enumerate(replayed_texts(task)):
        prompt, sample = divmod(index, task.responses)
        tokens = [*tokenizer(text)["input_ids"], tokenizer.convert_tokens_to_ids("<|im_end|>")]
        logprobs = np.zeros(len(tokens), np.float32)
        reward = score(text, "", ())
        rollout.responses.append(Response(prompt, sample, tokens, logprobs, True, text, reward))
    rollout.train_prompts = {prompt: GRPO_PACK_TOKENS for prompt in range(task.rows)}
    metrics = learn(models, rollout, 0, Clock()).metrics
    token_count = sum(len(response.tokens) for response in rollout.responses)
    return {
        **StepClock().columns(),
        "tokens": [token_count],
        "losses": [metrics["policy/loss"]],
        "norms": [metrics["policy/grad_norm"]],
    }


class PromptsInOrder(PromptStream):
    """Rows as prompts in the order of their file, as TRL takes them."""

    def __init__(self, rows: list[Row], processor: Processor) -> None:
        super().__init__(RowStream([(rows, 1.0)], seed=0), processor, {})
        self._rows = iter(rows)

    def draw(self, count: int) -> list[Row]:
        """Return the next ``count`` rows."""
        return list(itertools.islice(self._rows, count))


def run_iterations(task: PeerTask, folder: Path, models: Models, rows: list[Row]) -> BenchRow:
    """Run the iterations with vLLM, and log each as ``ovr rl`` does."""
    rollouts = build_rollouts(models.config, folder / MODEL, models.processor, models)
    log = open_log(models.config, 0, models.world)
    prompts = PromptsInOrder(rows, models.processor)
    clock = StepClock()
    tokens: list[int] = []
    phases = []
    with rollouts.grader:
        for iteration in range(task.step_count):
            metrics = iterate(models, rollouts, prompts, iteration).metrics
            if log:
                log.scalars(iteration, metrics)
            clock.end_step()
            tokens.append(learned_tokens(task, metrics))
            phases.append(seconds_of_phases(metrics))
    if log:
        log.close()
    return {**clock.columns(), "tokens": tokens, "losses": [], "norms": [], "phases": phases}


def run_ahead(task: PeerTask, config: RLConfig) -> BenchRow:
    """Run ``ovr rl`` on two processes, of which one generates for the next iteration while the other one learns.

    The rows come in the order of its own draw.  Nothing of the last iteration counts: nothing is generated beside it.
    """
    clock = StepClock()
    tokens: list[int] = []
    phases = []
    with distributed.process_group(config.run, config.parallel, config.rollout.ranks) as world:
        assert world.job is not None
        if world.job.generates:
            serve(config, world)
            return {}
        with RL(config, world) as rl:
            while rl.next_iteration < rl.last - 1:
                metrics = rl.iterate()
                assert metrics is not None
                clock.end_step()
                tokens.append(learned_tokens(task, metrics))
                phases.append(seconds_of_phases(metrics))
            rl.iterate()
    return {**clock.columns(), "tokens": tokens, "losses": [], "norms": [], "phases": phases}


def learned_tokens(task: PeerTask, metrics: Mapping[str, float]) -> int:
    """Return the tokens of all responses of an iteration, on all ranks."""
    return round(metrics["response/length"] * task.rows * task.responses)


def seconds_of_phases(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of an iteration's phases on the first rank."""
    return {name: metrics[f"timing/{name}"] for name in ("generate", "update", "sync")}


def main() -> None:
    """Measure the task of the command line and print its row."""
    task = PeerTask(**json.loads(sys.argv[1]))
    train = train_sft if task.kind == "sft" else train_grpo
    row = train(task, Path(sys.argv[2]))
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
