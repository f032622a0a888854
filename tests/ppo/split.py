"""Runs whose last ranks only generate, beside the same runs of one side: ``split.py OUT PART``.

``first`` ends with a run whose trainers are killed, ``second`` goes on with it, ``further`` has older responses,
``parts`` has responses that come in parts, ``tp1`` and ``tp2`` have two ranks on either side, with engines of one and
of two ranks.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import OmegaConf

from ovr_megatron.config import ParallelConfig, RLConfig, Sampling, build, defaults
from ovr_megatron.data.processing import Processor
from ovr_megatron.errors import UserError
from ovr_megatron.launch import RECIPES
from ovr_megatron.ppo import split_iteration
from ovr_megatron.ppo.batch import seeds_of
from ovr_megatron.ppo.parts import PartSender
from ovr_megatron.ppo.rollouts import Rollouts
from ovr_megatron.ppo.update import PolicyStep
from ovr_megatron.rl import training as rl
from ovr_megatron.rl.rehearsal import rehearse
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.rollout.sampling import Generation, Prompt
from ovr_megatron.runtime import distributed
from tests.ppo.questions import questions_source

SIZES = ("iterations=2", "prompts=4", "responses=2", "run.save_every=1", "run.keep_last=0", "run.peak_tflops=1")
RULES = "reward.rules={image: 'parity:even', text: 'parity:even'}"
EVALUATION = (
    "evaluation.every=2",
    "evaluation.limit=2",
    "evaluation.max_tokens=8",
    "evaluation.sources=[{path: 'puzzle:digits?form=text&task=sum', name: sums}]",
)
AHEAD = ("iterations=4", "run.save_every=2", "rollout.max_staleness=1")
FURTHER = ("iterations=5", "run.save_every=3", "rollout.max_staleness=2")
# Responses that go on under new weights; an engine that begins some of them late.
IN_FLIGHT = (*FURTHER, "rollout.oversample=0.5", "rollout.max_num_seqs=3")
# Rounds that draw more prompts than they train on, of which the generators alone know how many.
SAMPLED = ("iterations=3", "prompts=3", "algorithm.dynamic_sampling=3")
TAIL = ("iterations=3", "rollout.oversample=0.5")
# Prompts that come again, and turns that are skipped, by rewards that the generators alone know before the next draw.
CHOSEN = ("algorithm.prompt_replay=0.9", "algorithm.prompt_cooldown=1", "algorithm.prompt_exploration=0.5")


# Responses that come in parts, two prompts each; and the same in one part.
PARTS = (
    *("algorithm.estimator=grpo", "prompts=6", "rollout.max_num_seqs=4", "iterations=2"),
    "algorithm.kl_coefficient=0.01",
)


def config(name: str, *more: str) -> RLConfig:
    values = OmegaConf.load(RECIPES / "tiny_rl.yaml")
    values.pop("defaults")
    options = [f"run.dir={out / name}", f"model.path={out / 'model'}", *SIZES, RULES, *more]
    merged = OmegaConf.merge(defaults(RLConfig), values, {"algorithm": {"critic_warmup_iterations": 0}})
    return build(RLConfig, OmegaConf.merge(merged, OmegaConf.from_dotlist(options)))


def train(name: str, *more: str, pause_s: float = 0.0) -> int:
    """Train with ranks that only generate, each iteration ``pause_s`` longer; return the exit code."""
    chosen = config(name, f"rollout.ranks={world.job.generators}", *more)
    side = world if world.job.generates else replace(world, layout=world.arrange(chosen.parallel))
    with timed(name, pause_s):
        return rl.train(chosen, side).exit_code


def train_alone(name: str, *more: str) -> None:
    """Train on the trainers alone, which then generate, too."""
    if not world.job.generates:
        rl.train(config(name, *more), replace(world, job=None))


@contextmanager
def timed(name: str, pause_s: float) -> Iterator[None]:
    """Write when this side generated or learned within the block, [iteration, begin, end], to ``NAME.SIDE.json``."""
    spans: list[tuple[int, float, float]] = []

    def record(work: Any, pause_s: float) -> Any:
        def run(*arguments: Any) -> Any:
            began = time.time()
            result = work(*arguments)
            time.sleep(pause_s)
            spans.append((arguments[2], began, time.time()))
            return result

        return run

    learn, collect = split_iteration.learn, Rollouts.collect
    split_iteration.learn, Rollouts.collect = record(learn, 0.0), record(collect, pause_s)
    try:
        yield
    finally:
        split_iteration.learn, Rollouts.collect = learn, collect
        if world.is_main:
            (out / f"{name}.{world.job.side}.json").write_text(json.dumps(spans))


@contextmanager
def stop_after_first_part(iteration: int) -> Iterator[None]:
    """Ask the generators to stop within the block as soon as they have sent the first part of an iteration."""
    begin, send = PartSender.__init__, PartSender._send
    iterations: list[PartSender] = []

    def begin_iteration(sender: PartSender, *arguments: Any) -> None:
        begin(sender, *arguments)
        iterations.append(sender)

    def send_and_stop(sender: PartSender, *arguments: Any, **options: Any) -> None:
        send(sender, *arguments, **options)
        if len(iterations) == iteration + 1:
            assert not options["is_last"]
            os.kill(os.getpid(), signal.SIGTERM)

    PartSender.__init__, PartSender._send = begin_iteration, send_and_stop
    try:
        yield
    finally:
        PartSender.__init__, PartSender._send = begin, send


@contextmanager
def refused_prompt(iteration: int, prompt: int) -> Iterator[None]:
    """Have vLLM refuse a prompt within the block, as it refuses a request that it cannot take."""
    seeds = seeds_of(1, iteration, prompt, 2)
    enqueue = RolloutEngine._enqueue

    def refuse(engine: RolloutEngine, request: Prompt) -> list[str]:
        if list(request.seeds) == seeds:
            raise ValueError("refused")
        return enqueue(engine, request)

    RolloutEngine._enqueue = refuse
    try:
        yield
    finally:
        RolloutEngine._enqueue = enqueue


@contextmanager
def timed_parts(name: str) -> Iterator[None]:
    """Write when gradients of a part, steps of the policy and of an engine began within the block."""
    times: list[tuple[str, float]] = []

    def record(work: Any, what: str) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            times.append((what, time.time()))
            return work(*arguments, **options)

        return run

    room_left, add, finish = RolloutEngine.room_left, PolicyStep.add, PolicyStep.finish
    RolloutEngine.room_left = record(room_left, "engine step")
    PolicyStep.add, PolicyStep.finish = record(add, "part"), record(finish, "step")
    try:
        yield
    finally:
        RolloutEngine.room_left, PolicyStep.add, PolicyStep.finish = room_left, add, finish
        if world.is_main:
            (out / f"{name}.{world.job.side}.parts.json").write_text(json.dumps(times))


@contextmanager
def checked_updates(name: str) -> Iterator[None]:
    """Compare, after the block, what each update made of the engine with an engine that reads the checkpoint."""
    update = RolloutEngine.update
    after_update: list[list[list[Generation]]] = []

    def update_and_answer(engine: RolloutEngine, shards: Any) -> Any:
        traffic = update(engine, shards)
        after_update.append(engine.generate(prompts))
        return traffic

    processor = Processor(out / "model", config(name).data)
    tokens = [processor.tokenizer.encode(text) for text in ("Add the red digits.", "Which is larger?")]
    prompts = [Prompt(ids, seeds=(1, 2), sampling=Sampling(1.0, 8)) for ids in tokens]
    RolloutEngine.update = update_and_answer
    try:
        yield
    finally:
        RolloutEngine.update = update
    if not world.job.generates:
        return
    equal = []
    folders = [out / "model", *sorted((out / name / "checkpoints").glob("step_*/policy"))]
    for folder, answers in zip(folders, after_update, strict=True):
        fresh = RolloutEngine(folder, config(name).rollout, processor, "float32", 128, group=world.job.group)
        equal.append(same(answers, fresh.generate(prompts)))
    differ = not same(after_update[0], after_update[1])
    (out / f"{name}.updates.json").write_text(json.dumps({"equal": equal, "differ": differ}))


def same(ours: list[list[Generation]], theirs: list[list[Generation]]) -> bool:
    """Whether all tokens and log-probabilities are those, bit for bit."""
    return all(
        a.tokens == b.tokens and a.logprobs.tobytes() == b.logprobs.tobytes()
        for mine, others in zip(ours, theirs, strict=True)
        for a, b in zip(mine, others, strict=True)
    )


@contextmanager
def on_iteration(iteration: int, act: Any) -> Iterator[None]:
    """Call ``act`` within the block before an iteration is generated, on the generators, or learned from."""
    learn, collect = split_iteration.learn, Rollouts.collect

    def early(work: Any) -> Any:
        def run(*arguments: Any) -> Any:
            if arguments[2] == iteration:
                act()
            return work(*arguments)

        return run

    split_iteration.learn, Rollouts.collect = early(learn), early(collect)
    try:
        yield
    finally:
        split_iteration.learn, Rollouts.collect = learn, collect


def resume(name: str, resumed: str, step: int, *more: str, rollouts: bool = True) -> None:
    """Copy a checkpoint, and with ``rollouts`` those that are there, into another folder, and train the rest."""
    if world.job.rank == 0:
        checkpoint = f"checkpoints/step_{step:06d}"
        shutil.copytree(out / name / checkpoint, out / resumed / checkpoint)
        if rollouts:
            shutil.copytree(out / name / "rollouts", out / resumed / "rollouts")
    dist.barrier(world.job.messages)
    train(resumed, *more)


def kill_trainers() -> None:
    if not world.job.generates:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1)


def ask_generators_to_stop() -> None:
    if world.job.generates:
        os.kill(os.getpid(), signal.SIGTERM)


def ask_trainers_to_stop() -> None:
    if not world.job.generates:
        os.kill(os.getpid(), signal.SIGTERM)


def stopped(name: str, act: Any, *more: str) -> None:
    """Train with a signal in iteration 1, and write the exit code of either side."""
    with on_iteration(1, act):
        code = train(name, *more)
    (out / f"{name}.{world.job.side}.txt").write_text(str(code))


def refused(name: str, *more: str) -> None:
    """Train with prompts that the engine refuses, and write what either side says of it."""
    enqueue = RolloutEngine._enqueue

    def refuse(engine: RolloutEngine, prompt: Prompt) -> list[str]:
        raise ValueError("this engine takes no prompt")

    RolloutEngine._enqueue = refuse
    try:
        train(name, *more)
    except UserError as error:
        (out / f"{name}.{world.job.side}.txt").write_text(f"{type(error).__name__}: {error}")
    finally:
        RolloutEngine._enqueue = enqueue


if __name__ == "__main__":
    out = Path(sys.argv[1])
    part = sys.argv[2]
    world = distributed.start(ParallelConfig(), seed=1, threads=1, generators=2 if part in ("tp1", "tp2") else 1)
    if part in ("tp1", "tp2"):
        tp = f"rollout.tp={part[-1]}"
        train("turns", tp, *EVALUATION)
        train_alone("one", tp, *EVALUATION)
        ahead = (*AHEAD, tp, "parallel.tp=2", "rollout.check_updates=true", "rollout.bucket_mib=0.1", "offload=true")
        train("ahead", *ahead)
        resume("ahead", "ahead_resumed", 2, *ahead)
        resume("ahead", "ahead_lost", 2, *ahead, rollouts=False)
        for name, settings in (("sampled", SAMPLED), ("tail", TAIL)):
            train(name, tp, *settings)
            train_alone(f"{name}_one", tp, *settings)
        for name, settings in (("whole", ()), ("parts", ("rollout.stream_parts=3",))):
            train(name, tp, *PARTS, *settings)
        train("in_flight", tp, *IN_FLIGHT)
        resume("in_flight", "in_flight_resumed", 3, tp, *IN_FLIGHT)
    elif part == "further":
        for name, settings in (("further", FURTHER), ("in_flight", IN_FLIGHT)):
            train(name, *settings)
            resume(name, f"{name}_resumed", 3, *settings)
        sources = questions_source(out, world.job.rank == 0)
        dist.barrier(world.job.messages)
        train("chosen", *CHOSEN, sources, "iterations=3")
        train_alone("chosen_one", *CHOSEN, sources, "iterations=3")
        train("chosen_ahead", *FURTHER, *CHOSEN, sources)
        resume("chosen_ahead", "chosen_ahead_resumed", 3, *FURTHER, *CHOSEN, sources)
        # Without the archive of what was generated ahead.
        resume("in_flight", "in_flight_lost", 3, *IN_FLIGHT, rollouts=False)
    elif part == "parts":
        in_parts = (*PARTS, "rollout.stream_parts=3")
        with refused_prompt(0, 4):
            train("whole", *PARTS)
            train("one_part", *PARTS, "rollout.stream_parts=1")
            with timed_parts("parts"):
                train("parts", *in_parts)
            with stop_after_first_part(1):
                code = train("stopped", *in_parts)
        (out / f"stopped.{world.job.side}.txt").write_text(str(code))
        train("stopped", *in_parts)
        train("shared", *in_parts, "rollout.schedule=shared", "model.lora.rank=2", "offload=true")
    elif part == "first":
        with checked_updates("turns"):
            train("turns", *EVALUATION)
        train_alone("one", *EVALUATION)
        resume("turns", "turns_resumed", 1, *EVALUATION)
        # Longer than what the trainers do between two iterations: this shows what they do meanwhile.
        train("ahead", *AHEAD, *EVALUATION, pause_s=0.7)
        with on_iteration(3, kill_trainers):
            train("killed", *AHEAD, *EVALUATION)
    else:
        train("killed", *AHEAD, *EVALUATION)
        rehearse(config("rehearsed", "only=rehearsal", "rollout.ranks=1"), world)
        stopped("stopped", ask_generators_to_stop)
        # No checkpoint is due then, so that what was generated ahead is not kept, whenever the signal is heard of.
        stopped("stopped_ahead", ask_trainers_to_stop, *AHEAD, "run.save_every=5")
        train("stopped_ahead", *AHEAD, "run.save_every=5")
        refused("refused")
    distributed.finish()
