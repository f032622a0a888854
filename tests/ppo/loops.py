"""PPO and its relatives on two ranks, for tests/ppo: ``torchrun ... tests/ppo/loops.py OUT [reference [NAME ...]]``.

With ``reference`` only the runs that tests/ppo/test_reference.py reads, or those named; with ``tail`` only those of
oversampled rounds, with ``partial`` those that go on with unfinished responses, with ``taught`` those with a teacher,
with ``one_engine`` one that resumes unfinished responses, with ``chosen`` those whose prompts earlier rewards choose.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import Tensor

from ovr_megatron import replay
from ovr_megatron.config import AlgorithmConfig, ParallelConfig, RLConfig, build, defaults
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.stream import open_stream
from ovr_megatron.launch import RECIPES
from ovr_megatron.ppo import archive
from ovr_megatron.ppo.batch import Batch, seeds_of
from ovr_megatron.ppo.experience import (
    CriticBatch,
    Experience,
    Models,
    build_local_batch,
    compute_experience,
    sum_over_dp,
)
from ovr_megatron.ppo.iteration import rollout_staleness
from ovr_megatron.ppo.losses import LOSSES
from ovr_megatron.ppo.objectives import PolicyObjective, ValueObjective
from ovr_megatron.ppo.prompts import PromptStream
from ovr_megatron.ppo.reductions import token_weights
from ovr_megatron.ppo.update import PolicyStep, critic_packs, policy_packs, update_policy
from ovr_megatron.rl import training as rl
from ovr_megatron.rl.generation import generate
from ovr_megatron.rl.setup import build_models
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.rollout.sampling import Prompt
from ovr_megatron.runtime import distributed
from tests.model.matrix import WHOLE
from tests.ppo.off_policy import largest_difference_on_ranks
from tests.ppo.questions import questions_source

SIZES = ("iterations=2", "prompts=4", "responses=4", "run.save_every=1", "run.keep_last=0")
RULES = "reward.rules={image: 'parity:even', text: 'parity:even'}"
ALGORITHMS = {
    "grpo": ("estimator=grpo",),
    "dapo": (
        *("estimator=grpo", "clip_high=0.28", "policy_steps=2", "wrong_reward=-1", "dynamic_sampling=3"),
        *("overlong_buffer=16", "correction=token_truncate"),
    ),
    "dr_grpo": ("estimator=dr_grpo", "reduction=constant", "kl_coefficient=0.01", "entropy_bonus=0.001"),
    "rloo": (
        "estimator=rloo",
        "reduction=constant",
        "reduction_tokens=1",
        "kl_coefficient=0.05",
        "kl_in=reward",
        "kl_form=k1",
    ),
    "reinforce_pp": (
        *("estimator=reinforce_pp", "policy_epochs=2", "policy_steps=2"),
        "correction=sequence_truncate",
    ),
    "ppo_epochs": ("policy_epochs=2", "reduction=pack", "value_clip=0.2"),
    "ppo_stored": ("policy_epochs=2",),
    "gspo": ("estimator=grpo", "loss=gspo", "reduction=sequence", "clip=0.02", "policy_steps=2"),
    "ppo_outside": ("estimator=outside_rows:BLEND", "loss=outside_rows:sequence_weighted", "policy_epochs=2"),
}
# Every option at once, each at a value that shows; iteration 1 is the first that the policy learns from, and the
# curriculum's second stage.  A prompt of every iteration is given up.
EVERYTHING = (
    *("responses=3", "rollout.temperature=0.8", "curriculum=[{until: 1, max_tokens: 88}, {until: 9, max_tokens: 104}]"),
    *("optimizer.lr=1e-3", "optimizer.schedule=cosine", "optimizer.warmup_steps=1", "optimizer.beta1=0.8"),
    *("optimizer.eps=1e-5", "optimizer.weight_decay=0.1", "optimizer.clip_grad=0.3"),
    *("critic.optimizer.lr=2e-3", "critic.optimizer.schedule=linear", "critic.optimizer.warmup_steps=2"),
    *("critic.optimizer.beta2=0.9", "critic.optimizer.eps=1e-6", "critic.optimizer.clip_grad=0.7"),
    *("critic.optimizer.weight_decay=0.2", "algorithm.critic_warmup_iterations=1", "algorithm.critic_steps=5"),
    *("algorithm.policy_epochs=2", "algorithm.policy_steps=2", "algorithm.gamma=0.98", "algorithm.lam=0.95"),
    *("algorithm.lam_policy=0.9", "algorithm.positive_nll=0.1", "algorithm.dual_clip=1.01"),
    *("algorithm.clip=0.02", "algorithm.clip_high=0.05", "algorithm.value_clip=0.01", "algorithm.reduction=sequence"),
    *("algorithm.kl_coefficient=0.05", "algorithm.kl_form=k3", "algorithm.entropy_bonus=0.02"),
    *("algorithm.correction=token_truncate", "algorithm.correction_high=0.5"),
    *("algorithm.dynamic_sampling=2", "algorithm.overlong_buffer=24"),
    "algorithm.wrong_reward=-0.5",
)
# Engines that begin some responses late, and a limit that rises, after which responses that had reached it go on.
CONTINUED = (
    *("rollout.oversample=0.5", "rollout.max_staleness=1", "rollout.max_num_seqs=3", "iterations=4"),
    "curriculum=[{until: 2, max_tokens: 72}, {until: 9, max_tokens: 88}]",
)
# Few rows, so that epochs end; prompts that come again, and turns that are skipped.
CHOSEN = (
    *("algorithm.estimator=grpo", "algorithm.prompt_replay=0.9", "algorithm.prompt_cooldown=1"),
    *("algorithm.prompt_exploration=0.5", "algorithm.dynamic_sampling=2", "iterations=4"),
)
CHOSEN_PARTIAL = (*CHOSEN, *CONTINUED, "algorithm.dynamic_sampling=0")
# A teacher alone, of prompts whose responses go on in a later round; and one of another layout beside rewards.
TAUGHT = ("algorithm.estimator=none", "algorithm.correction=token_truncate", *CONTINUED, "iterations=3")
MIXED = (
    *("algorithm.estimator=grpo", "algorithm.teacher_coefficient=0.5", "algorithm.teacher_parallel={tp: 2}"),
    *("algorithm.policy_steps=2", "offload=true", "share_prompts=true", "iterations=1"),
)
IN_REWARD = (
    *(
        "algorithm.kl_in=reward",
        "algorithm.kl_form=k1",
        "algorithm.reduction=constant",
        "algorithm.reduction_tokens=20",
    ),
    *(
        "rollout.temperature=1.3",
        "algorithm.dynamic_sampling=0",
        "algorithm.policy_epochs=1",
        "algorithm.policy_steps=1",
    ),
    *("data.max_prompt_tokens=35", "algorithm.critic_warmup_iterations=0", "algorithm.value_clip=0"),
)


def config(name: str, *more: str) -> RLConfig:
    values = OmegaConf.load(RECIPES / "tiny_rl.yaml")
    values.pop("defaults")
    options = [f"run.dir={out / name}", f"model.path={out / 'model'}", *SIZES, RULES, *more]
    merged = OmegaConf.merge(defaults(RLConfig), values, {"algorithm": {"critic_warmup_iterations": 0}})
    return build(RLConfig, OmegaConf.merge(merged, OmegaConf.from_dotlist(options)))


def train(name: str, *more: str) -> None:
    chosen = config(name, *more)
    rl.train(chosen, replace(world, layout=world.arrange(chosen.parallel)))


def again(name: str, iteration: int, *more: str) -> list[dict]:
    chosen = replay.load(out / name, more)
    there = replace(world, layout=world.arrange(chosen.parallel))
    return [vars(line) for line in replay.replay(chosen, out / name, iteration, there)]


def resume_after(name: str, step: int, resumed: str, *more: str) -> None:
    """Copy a checkpoint of a run into another folder and train the rest there.  A collective."""
    if world.is_main:
        folder = f"checkpoints/step_{step:06d}"
        shutil.copytree(out / name / folder, out / resumed / folder)
    dist.barrier()
    train(resumed, *more)


def saved_experience(chosen: RLConfig) -> tuple[Models, Experience, CriticBatch | None]:
    """Build the models as they are initially, and what they learn from the responses of iteration 0 of ``ppo``."""
    there = replace(world, layout=world.arrange(chosen.parallel))
    processor = Processor(out / "model", chosen.data)
    models, _ = build_models(chosen, out / "model", processor, there)
    prompts = PromptStream(open_stream(chosen.data, chosen.run.seed), processor, chosen.reward.rules)
    rollout = archive.restore(archive.read(out / "ppo", 0, world), prompts)
    return models, *compute_experience(models, rollout, *build_local_batch(models, rollout, models.policy), iteration=0)


def stale_update(stale_rank: int | None) -> dict[str, float]:
    """Metrics of an update in iteration 7, half of whose tokens on one rank weights of iteration 5 drew."""
    models, experience, _ = saved_experience(config("ppo", "algorithm.estimator=grpo", "algorithm.correction=icepop"))
    ages = []
    for response in experience.responses:
        age = np.arange(len(response.tokens)) % 2 * 2 * (world.rank == stale_rank)
        ages.append(age)
        if world.rank == stale_rank:
            response.versions = (7 - age).astype(np.int32)
    total, count = sum_over_dp(np.array([sum(map(sum, ages)), sum(map(len, ages))]), models.policy.layout)
    staleness = rollout_staleness(models, experience.responses, 7)
    return update_policy(models, experience, 7) | staleness | {"expected_staleness": total / count}


def critic_gradients(*more: str) -> dict[str, Tensor]:
    """Those of the first step of iteration 0, with the saved responses cut in another way."""
    chosen = config("ppo", *more)
    models, _, critic_batch = saved_experience(chosen)
    packs = critic_packs(models, critic_batch, 0)
    models.critic.backward(packs, ValueObjective(chosen.algorithm))
    return {name: gradient.clone() for name, gradient in models.critic.gradients()} | {"packs": len(packs)}


def policy_gradients(*more: str) -> dict[str, dict[str, Tensor]]:
    """Those of every loss in a step on half of iteration 0, by a policy that has moved, cut in another way."""
    settings = ("estimator=grpo", "policy_steps=2", "positive_nll=0.1", "reduction=sequence", "clip=0.03")
    chosen = config("ppo", *(f"algorithm.{setting}" for setting in settings), *more)
    models, experience, _ = saved_experience(chosen)
    for i, response in enumerate(experience.responses):
        noise = np.random.default_rng([response.prompt, response.sample]).normal(size=len(response.tokens))
        experience.old[i] = experience.old[i] + 0.05 * noise
    found = {}
    for name in LOSSES.rows:
        objective = PolicyObjective(replace(chosen.algorithm, loss=name), models.policy.groups.cp)
        packs = policy_packs(models, experience, {}, 0)
        models.policy.backward(packs, objective)
        gradients = {key: gradient.clone() for key, gradient in models.policy.gradients()}
        found[name] = gradients | {"packs": len(packs)}
    return found


def part_gradients(reduction: str, *more: str) -> dict[str, float]:
    """Compare those of three parts of iteration 0, one after the other, with those of one pass over the same packs."""
    chosen = config("ppo", "algorithm.estimator=grpo", f"algorithm.reduction={reduction}", *more)
    models, experience, _ = saved_experience(chosen)
    policy = models.policy
    batch = experience.batch
    parts = []
    pack_members = []
    for part in ({2}, {0, 3}, {1}):  # in two of them a rank has no responses
        members = [i for i, response in enumerate(experience.responses) if response.prompt in part]
        samples, lengths = [batch.samples[i] for i in members], [batch.lengths[i] for i in members]
        part_batch = Batch(samples, lengths, batch.pack_tokens, range(len(members)), len(members))
        responses, advantages = (
            [values[i] for i in members] for values in (experience.responses, experience.advantages)
        )
        parts.append(Experience(responses, part_batch, advantages))
        for pack in part_batch.group_into_packs(range(len(members))):
            if pack:
                pack_members.append([members[i] for i in pack])
    sum_over_ranks = partial(sum_over_dp, layout=policy.layout)
    weights = token_weights(reduction, batch.lengths, pack_members, chosen.reduction_tokens, sum_over_ranks)
    logprobs = [response.logprobs for response in experience.responses]
    arrays = {"advantages": experience.advantages, "rollout_logprobs": logprobs, "weights": weights}
    means = policy.backward(batch.packs(pack_members, **arrays), PolicyObjective(chosen.algorithm, policy.groups.cp))
    whole = {name: gradient.clone() for name, gradient in policy.gradients()}
    vars(policy)["step"] = lambda: {"grad_norm": 0.0}  # it would clip them
    step = PolicyStep(models, ())
    for part_experience in parts:
        step.add(part_experience, is_last=part_experience is parts[-1])
    metrics = step.finish()
    found = differences(dict(policy.gradients()) | {"packs": 0}, whole | {"packs": 0})
    size = sum(float(gradient.double().square().sum()) for gradient in whole.values()) ** 0.5
    return {"error": found["error"], "size": size, "loss": abs(metrics["policy/loss"] - means["loss"])}


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Of all gradients together, and the numbers of packs."""
    names = [name for name in ours if name != "packs"]
    apart = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in names) ** 0.5
    size = sum(float(theirs[name].double().square().sum()) for name in names) ** 0.5
    return {"error": apart / size, "packs": ours["packs"], "before": theirs["packs"]}


@contextmanager
def refused_prompts() -> Iterator[None]:
    """Have vLLM refuse prompt 1 of every iteration within the block, as it refuses a request that it cannot take."""
    refused = [seeds_of(1, iteration, 1, 3) for iteration in range(2)]
    enqueue = RolloutEngine._enqueue

    def refusing(engine: RolloutEngine, prompt: Prompt) -> list[str]:
        if list(prompt.seeds) in refused:
            raise ValueError("refused")
        return enqueue(engine, prompt)

    RolloutEngine._enqueue = refusing
    try:
        yield
    finally:
        RolloutEngine._enqueue = enqueue


def reference_runs(names: Sequence[str]) -> None:
    """Train those of the runs that tests/ppo/test_reference.py computes again; all without ``names``."""
    everything = (*EVERYTHING, f"algorithm.reference={out / 'other'}")
    # One response in a step of the critic: one of two ranks has none.
    options = {"ppo": (), "sparse": ("iterations=1", "responses=1"), "everything": everything}
    options["everything_reward"] = (*everything, *IN_REWARD)
    for name in names or options:
        with refused_prompts() if name.startswith("everything") else nullcontext():
            train(name, *options[name])


def critic_runs() -> None:
    """Train a critic alone and PPO after it, warm-ups that end early, and a critic of another size."""
    train("critic_alone", "only=critic", f"rollouts_from={out / 'ppo'}")
    pretrained = f"critic.path={out / 'critic_alone/checkpoints/step_000002'}"
    train("pretrained", "only=train", f"rollouts_from={out / 'ppo'}", "iterations=1", pretrained)
    # Values that stay 0 explain nothing in any iteration.
    silent = (f"critic.path={out / 'silent'}", "critic.optimizer.lr=1e-30", f"rollouts_from={out / 'tail'}")
    settings = (*silent, "rollout.oversample=0.5", "iterations=3", "optimizer.schedule=linear")
    train("warm_fixed", *settings, "only=train", "algorithm.critic_warmup_iterations=2")
    patient = ("only=train", "algorithm.critic_warmup_iterations=3", "algorithm.critic_warmup_patience=2")
    train("warm_patient", *settings, *patient)
    resume_after("warm_patient", 1, "warm_resumed", *settings, *patient)
    for _ in range(2):  # the second start has nothing to do
        train("critic_early", *settings, "only=critic", "algorithm.critic_warmup_patience=1")
    train("small_critic", f"critic.path={out / 'small'}", "critic.parallel={tp: 2}", "iterations=1")


def oversampled_runs() -> None:
    """Train with rounds that postpone long prompts: whole, resumed, beside a slow engine, and from its archive."""
    settings = ("rollout.oversample=0.5", "iterations=5")
    train("tail", *settings)
    resume_after("tail", 1, "tail_resumed", *settings)
    with slow_engine(rank=1):
        train("tail_slow", *settings, "iterations=2")
    train("tail_learned", *settings, "only=train", f"rollouts_from={out / 'tail'}")


def continued_runs() -> None:
    """Train with rounds that go on with responses: the entire run, resumed, beside a slow engine, from its archive."""
    train("partial", *CONTINUED)
    resume_after("partial", 2, "partial_resumed", *CONTINUED)
    with slow_engine(rank=1):
        train("partial_slow", *CONTINUED, "iterations=2")
    train("partial_learned", *CONTINUED, "only=train", f"rollouts_from={out / 'partial'}")
    train("partial_critic", *CONTINUED, "only=critic", f"rollouts_from={out / 'partial'}", "iterations=2")


def chosen_runs() -> None:
    """Train on prompts that the rewards of earlier iterations choose: whole, resumed, and from the archive."""
    sources = questions_source(out, world.is_main)
    dist.barrier()
    for name, settings in (("chosen", CHOSEN), ("chosen_partial", CHOSEN_PARTIAL)):
        train(name, *settings, sources)
        resume_after(name, 2, f"{name}_resumed", *settings, sources)
    train("chosen_learned", *CHOSEN, sources, "only=train", f"rollouts_from={out / 'chosen'}")
    replayed = again("chosen_partial", 3)
    if world.is_main:
        (out / "chosen.json").write_text(json.dumps(replayed))


def taught_runs() -> None:
    """Distil from a teacher of another size: alone, resumed, beside rewards, and from the policy's own weights."""
    teacher = f"algorithm.teacher={out / 'teacher'}"
    train("taught", *TAUGHT, teacher)
    resume_after("taught", 2, "taught_resumed", *TAUGHT, teacher)
    train("taught_mixed", *MIXED, teacher)
    train("taught_by_itself", "algorithm.estimator=none", f"algorithm.teacher={out / 'model'}", "iterations=1")
    layouts = {name: again("taught", 2, f"parallel.{name}=2") for name in ("tp", "pp", "cp")}
    layouts["same"] = again("taught", 2)
    layouts["teacher in two stages"] = again("taught", 2, "algorithm.teacher_parallel={pp: 2}")
    layouts["mixed"] = again("taught_mixed", 0, "parallel.pp=2", "algorithm.teacher_parallel=null")
    if world.is_main:
        (out / "taught.json").write_text(json.dumps(layouts))


def run_of_one_engine() -> None:
    """Have one engine of two ranks go on with what two engines have left; no process can have engines of both sizes."""
    resume_after("partial", 3, "partial_tp2", *CONTINUED, "rollout.tp=2")


@contextmanager
def slow_engine(rank: int) -> Iterator[None]:
    """Delay every step of the engine of ``rank`` within the block."""
    answer = RolloutEngine.answer

    def answer_late(
        engine: RolloutEngine,
        take: Callable,
        on_result: Callable,
        should_stop: Callable[[], bool],
        *more: Callable | None,
    ) -> list[tuple[int, str]]:
        def pause() -> bool:
            if world.rank == rank:
                time.sleep(0.02)
            return should_stop()

        return answer(engine, take, on_result, pause, *more)

    RolloutEngine.answer = answer_late
    try:
        yield
    finally:
        RolloutEngine.answer = answer


PARTS = {
    "tail": oversampled_runs,
    "partial": continued_runs,
    "taught": taught_runs,
    "chosen": chosen_runs,
    "one_engine": run_of_one_engine,
}

if __name__ == "__main__":
    out = Path(sys.argv[1])
    world = distributed.start(ParallelConfig(), seed=1, threads=1)
    if parts := PARTS.get(sys.argv[-1]):
        parts()
        distributed.finish()
        sys.exit()
    reference_runs(sys.argv[3:])
    if sys.argv[2:]:  # tests/soak/mutants.py
        distributed.finish()
        sys.exit()
    train("ppo_offload", "offload=true", "rollout.check_updates=true", "rollout.bucket_mib=0.1")
    train("ppo_shared", "rollout.schedule=shared", "rollout.max_num_seqs=8")
    train("ppo_critic_tp2", "critic.parallel={tp: 2}")
    train("ppo_first_responses", "rollout.extra_responses=8", "iterations=1")
    if not WHOLE:  # another row has the estimator, or the epochs; the equations have tests of their own
        for name in ("grpo", "dr_grpo", "ppo_epochs"):
            del ALGORITHMS[name]
    for name, settings in ALGORITHMS.items():
        train(name, *(f"algorithm.{setting}" for setting in settings))
    adapters = ("model.lora.rank=4", "optimizer.lr=1e-2", "critic.optimizer.lr=1e-2", "algorithm.kl_coefficient=0.01")
    train("lora", *adapters)
    resume_after("lora", 1, "lora_resumed", *adapters)
    train("lora_tp2", *adapters, "parallel.tp=2", "rollout.check_updates=true", "offload=true")
    if world.is_main:
        shutil.copytree(out / "model", out / "equal")
    dist.barrier()
    # Weights of another folder are the critic's own memory, also where they are equal.
    train("lora_two_bases", *adapters, "parallel.tp=2", "offload=true", f"critic.path={out / 'equal'}")
    train("learned", "only=train", f"rollouts_from={out / 'ppo'}")
    oversampled_runs()
    continued_runs()
    critic_runs()
    taught_runs()
    chosen_runs()
    half = config("rolled_out", "only=rollout", "iterations=1")
    generate(half, world)
    found = {
        "same": again("ppo", 1),
        "tp2": again("ppo", 1, "parallel.tp=2"),
        "rloo": again("rloo", 1, "parallel.pp=2"),
        "reinforce_pp": again("reinforce_pp", 1, "parallel.cp=2"),
        "everything": again("everything", 1, "parallel.tp=2"),
        "partial": again("partial", 3, "parallel.tp=2"),
        "critic_tp2": again("ppo_critic_tp2", 1, "critic.parallel=null"),
        "warm": again("warm_patient", 2, "parallel.tp=2"),
        "small_critic": again("small_critic", 0, "critic.parallel=null"),
        "critic_alone": again("critic_alone", 1, "critic.parallel={tp: 2}"),
    }
    if WHOLE:
        found["gspo"] = again("gspo", 1, "parallel.cp=2")
    whole = critic_gradients()
    small = "data.max_prompt_tokens=64", "data.pack_tokens=160"
    cuts = {"micro-batches": small, "ranks": ("critic.parallel={cp: 2}",), "both": (*small, "critic.parallel={tp: 2}")}
    gradients = {name: differences(critic_gradients(*more), whole) for name, more in cuts.items()}
    policy = policy_gradients()
    policy_cuts = {"micro-batches": small} | {name: (f"parallel.{name}=2",) for name in ("tp", "cp", "pp")}
    for cut, more in policy_cuts.items():
        ours = policy_gradients(*more)
        gradients |= {f"{cut}, {name}": differences(ours[name], policy[name]) for name in policy}
    parts = {}
    sharded = "parallel={overlap: true, distributed_optimizer: true}"
    for name in ("", "parallel.tp=2", "parallel.cp=2", "parallel={pp: 2, vpp: 2}", sharded):
        parts[name] = part_gradients("sequence", *filter(None, [name]))
    for reduction in ("token", "constant", "pack"):
        parts[reduction] = part_gradients(reduction)
    stale = {"none": stale_update(None), "one_rank": stale_update(1)}
    shared = {}
    for name in ("sequence_truncate", "sequence_mask", "geometric_mask", "icepop"):
        shared[name] = largest_difference_on_ranks(AlgorithmConfig(correction=name))
    if world.is_main:
        (out / "stale.json").write_text(json.dumps(stale))
        (out / "shared.json").write_text(json.dumps(shared))
        (out / "parts.json").write_text(json.dumps(parts))
        (out / "gradients.json").write_text(json.dumps(gradients))
        (out / "replays.json").write_text(json.dumps(found))
    distributed.finish()
