"""Kill runs at moments drawn from a seed, and let each go on to its end."""

import json
import os
import random
import signal
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from ovr_megatron.checkpoint import writing
from ovr_megatron.data.processing import Processor
from ovr_megatron.engine import Engine
from ovr_megatron.ppo import archive, experience, generator_commands, generators, grading
from ovr_megatron.ppo.rollouts import Rollouts
from ovr_megatron.ppo.unfinished import UnfinishedResponses
from ovr_megatron.rl import training as rl
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.rollout.reshard import Reshard
from ovr_megatron.runtime.split_job import SplitJob
from tests.checkpoint.forked_runs import STEPS, Run, at, moment, wrap

NO_WARMUP = "algorithm.critic_warmup_iterations=0"
OVERSAMPLED = "rollout.oversample=0.5"


class Mode(NamedTuple):
    """Settings of a run that is killed.

    Attributes:
        stage: of `Run`.
        moments: kinds of `kill`, taken in turn.
        overrides: beside those of the stage.
        generator_moments: kinds whose victim is the rank that only generates; those of ``moments`` then are the
            trainer's.
    """

    stage: str
    moments: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    generator_moments: tuple[str, ...] = ()


# Ranks that only generate have no update, and the others no engine.
TRAINER = ("receive", "value", "update", "send", "archive", "save", "manifest", "rename", "clock")
GENERATOR = ("generate", "grade", "deliver", "sync", "clock")
MODES = {
    "sft": Mode("coldstart", ("data", "collective", "save", "manifest", "rename", "prune", "step")),
    "rl": Mode(
        "rl", ("generate", "grade", "exchange", "value", "update", "sync", "archive", "save", "manifest", "rename")
    ),
    "tail": Mode("rl", ("long", "clock", "generate", "long", "save", "update", "archive"), (OVERSAMPLED,)),
    "partial": Mode(
        "rl",
        ("stored", "clock", "stored_file", "handover", "rename", "stored_update", "generate"),
        # Engines that begin some responses late.
        (OVERSAMPLED, "rollout.max_staleness=1", "rollout.max_num_seqs=3"),
    ),
    "turns": Mode("rl", TRAINER, ("rollout.ranks=1",), GENERATOR),
    "ahead": Mode("rl", ("value", "ahead", *TRAINER), ("rollout.ranks=1", "rollout.max_staleness=1"), GENERATOR),
    "further": Mode("rl", ("value", "ahead", *TRAINER), ("rollout.ranks=1", "rollout.max_staleness=2"), GENERATOR),
    "parts": Mode(
        "rl",
        ("part", "step", "send", "part", *TRAINER[4:]),
        ("rollout.ranks=1", "rollout.stream_parts=2", "algorithm.estimator=grpo", NO_WARMUP),
        ("post", *GENERATOR),
    ),
    "in_flight": Mode(
        "rl",
        ("value", "stored_file", "ahead", "stored_update", *TRAINER),
        ("rollout.ranks=1", OVERSAMPLED, "rollout.max_staleness=2", "rollout.max_num_seqs=3"),
        ("generate", "stored", "handover", "deliver", "sync", "clock", "grade"),
    ),
}


WAYS = tuple(MODES)[2:]  # of generating
# Iterations at the end of a run in which the trainer gets no responses, as it has had all.
RECEIVED_AHEAD = {"ahead": 1, "further": 2, "in_flight": 1}


def die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_the_file(path: Path, *args: Any, **kwargs: Any) -> None:
    path.write_bytes(b"half a shard")
    die()


def die_after_the_manifest(partial: Path, *args: Any, **kwargs: Any) -> None:
    if partial.name.endswith(".partial") and (partial / "manifest.json").exists():
        die()


def die_in_the_loop_file(path: Path, *args: Any, **kwargs: Any) -> None:
    if path.parent.name == writing.LOOP:
        die_in_the_file(path)


def die_later(delay_s: float, *args: Any, **kwargs: Any) -> None:
    timer = threading.Timer(delay_s, die)
    timer.daemon = True
    timer.start()


def is_doomed(path: Path) -> bool:
    return path.name.endswith(".old") and path.exists()


def kill(rank: int, kind: str, victim: int, step: int, number: int, delay_s: float = 0.0) -> None:
    """SIGKILL of ``victim``; where only the first rank passes, it is the first."""
    saves = step - step % 2 + 1  # the step at whose end there is a save
    match kind:
        case "data" if rank == victim:
            at(Processor, "encode", step, 1, die)
        case "collective" if rank == victim:
            at(dist, "all_reduce", step, number, die)
        case "generate" | "long" | "stored" if rank == victim:  # some responses are there, others are not
            at(RolloutEngine, "room_left", step, 5 * number, die)
        case "grade" if rank == victim:
            at(grading.RoundGrading, "_submit", step, number, die)
        case "exchange" if rank == victim:
            at(experience, "exchange", step, 1, die)
        case "handover" if rank == victim:
            at(UnfinishedResponses, "send", step, 1, die)
        case "receive" | "deliver" if rank == victim:
            owner = generators if kind == "receive" else generator_commands
            at(owner, "exchange", step, 1, die)
        case "part" if rank == victim:  # the gradients of another part are there
            at(Engine, "reduce_gradients", step, 1, die)
        case "post" if rank == victim:
            at(SplitJob, "post", step, 1 + number % 2, die)
        case "value" if rank == victim:
            at(Engine, "scores", step, 1, die)
        case "update" | "stored_update" if rank == victim:
            at(Engine, "step", step, number, die)
        case "sync" if rank == victim:
            at(RolloutEngine, "update", step, 1, die)
        case "send" if rank == victim:
            at(Reshard, "update", step, 1, die)
        case "archive" if rank == victim:
            at(archive, "write_arrays", step, 1, lambda path, *rest: die_in_the_file(path))
        case "ahead" if rank == victim:  # the responses of the next iteration, for the checkpoint
            at(archive, "write_arrays", saves, 2, lambda path, *rest: die_in_the_file(path))
        case "step" if rank == victim:
            at(Engine, "step", step, 1, die)
        case "save" if rank == victim:
            wrap(writing, "write_shard", lambda path, *r: die_in_the_file(path) if moment["step"] >= saves else None)
        case "stored_file" if rank == victim:
            wrap(writing, "write_shard", die_in_the_loop_file)
        case "clock" if rank == victim:
            begin_clock = partial(die_later, delay_s)
            for owner, name in ((rl, "iterate"), (rl, "iterate_split"), (Rollouts, "collect")):
                at(owner, name, step, 1, begin_clock)
        case "manifest" if rank == 0:
            wrap(writing, "write_manifest", lambda *rest: die() if moment["step"] >= step else None)
        case "rename" if rank == 0:
            wrap(writing, "sync", lambda path: die_after_the_manifest(path) if moment["step"] >= step else None)
        case "prune" if rank == 0:
            wrap(writing.shutil, "rmtree", lambda path, **rest: die() if is_doomed(Path(path)) else None)


def kills(out: Path, seed: int, count: int, mode: str, whole: str) -> list[dict[str, Any]]:
    """Kill ``count`` runs at moments drawn from ``seed``, and let each go on to its end; ``whole`` ran undisturbed."""
    generator = random.Random(seed)
    stage, moments, overrides, generator_moments = MODES[mode]
    victims = [None] * len(moments)
    if generator_moments:
        # The two sides in turn.
        victims = [0, 1] * len(moments)
        longer = [generator_moments[index % len(generator_moments)] for index in range(len(moments))]
        moments = tuple(kind for pair in zip(moments, longer, strict=True) for kind in pair)
    lines = [json.loads(line) for line in (out / whole / "metrics/train.jsonl").read_text().splitlines()]
    entries = []
    for number in range(count):
        index = (seed + number) % len(moments)
        kind, victim = moments[index], victims[index]
        where = {"kind": kind, "victim": generator.randrange(2), "step": generator.randrange(1, STEPS)}
        where["number"] = generator.randrange(1, 4)
        if victim is not None:
            where["victim"] = victim
        steps = fitting_steps(kind, mode, lines)
        if where["step"] not in steps:
            where["step"] = generator.choice(steps)
        if kind == "clock":
            where["delay_s"] = generator.random() * shortest_s(lines[where["step"]])
        run = out / f"{mode}_kill_{number}"
        codes = Run(run, partial(kill, **where), *overrides, stage=stage).codes()
        saved = sorted(path.name for path in (run / "checkpoints").glob("*"))
        resumed = Run(run, None, *overrides, stage=stage).codes()
        entry = {**where, "run": run.name, "whole": whole, "killed": codes, "saved": saved, "resumed": resumed}
        print(json.dumps(entry), flush=True)
        entries.append(entry)
    return entries


def fitting_steps(kind: str, mode: str, lines: Sequence[dict[str, float]]) -> list[int]:
    """Return the steps in which there is the moment ``kind``, by the metrics of the undisturbed run."""
    steps = list(range(1, STEPS))
    if kind == "long":
        return [step for step in steps if lines[step]["rollout/long_round"]]
    if kind in ("stored", "stored_update", "handover"):
        # Tokens have been stored that are older than those of the round that finishes them.
        ahead = mode == "in_flight"
        return [step for step in steps if lines[step]["rollout/staleness_mean"] > ahead]
    if kind == "clock":
        # A run that is faster than the undisturbed one may have ended before the timer of its last step.
        return steps[:-1]
    if kind == "ahead":
        return steps[:-2]  # at the end nothing is generated ahead
    if kind == "receive":
        return steps[: -RECEIVED_AHEAD.get(mode, 0) or None]
    return steps


def shortest_s(line: dict[str, float]) -> float:
    """Return the seconds for which both sides of a job are at work in an iteration."""
    return min(line["timing/iteration"], line.get("timing/rollout", line["timing/iteration"]))
