"""Runs of two ranks that are killed, stopped or starved: ``disturbed.py OUT SEED KILLS [MODE...]``.

One process imports everything and forks the ranks of each run, so that a run costs its training only. What disturbs a
run is wrapped around the package's functions in the child. Results go to ``OUT/results.json``.  With modes of `kills`
there are the kills of these alone.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from ovr_megatron.checkpoint import writing
from ovr_megatron.checkpoint.manager import CheckpointManager
from ovr_megatron.checkpoint.manifest import write_manifest
from ovr_megatron.coldstart import training as coldstart
from ovr_megatron.data.processing import Processor
from ovr_megatron.engine import Engine
from ovr_megatron.evaluation import evaluator
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.ppo import rollouts
from ovr_megatron.rollout.engine import RolloutEngine
from tests.checkpoint.forked_runs import DEADLINE_S, STEPS, Run, at, moment, wrap
from tests.checkpoint.kills import MODES, WAYS, kills

# Disturbances: each is called in a rank before it trains --------------------------------------------------


def warn(rank: int, number: signal.Signals, victim: int, step: int) -> None:
    if rank == victim:
        at(Engine, "step", step, 1, lambda *args: os.kill(os.getpid(), number))


def warn_in_generation(rank: int, number: signal.Signals, victim: int, step: int) -> None:
    """In the middle: the engine has made some steps, and has others to make."""
    if rank == victim:
        at(RolloutEngine, "room_left", step, 8, lambda *args: os.kill(os.getpid(), number))


def warn_in_evaluation(rank: int) -> None:
    if rank == 1:
        at(evaluator, "_generate", 0, 1, lambda *args: os.kill(os.getpid(), signal.SIGUSR1))


def warn_in_update(rank: int, number: signal.Signals, victim: int, step: int) -> None:
    if rank == victim:
        at(Engine, "step", step, 1, lambda *args: os.kill(os.getpid(), number))


def hang_in_start(rank: int) -> None:
    if rank == 1:
        wrap(coldstart, "open_data", lambda *args: time.sleep(DEADLINE_S))


def slow_steps(rank: int, steps: int, seconds: float) -> None:
    """Rank 1 generates for ``steps`` x ``seconds`` in the second iteration, while the other has long been done."""
    seen = {"calls": 0}

    def pause(*args: Any) -> None:
        seen["calls"] += moment["step"] == 1
        if rank == 1 and moment["step"] == 1 and seen["calls"] <= steps:
            time.sleep(seconds)

    wrap(RolloutEngine, "room_left", pause)


def elsewhere(rank: int) -> None:
    os.environ["MASTER_ADDR"] = "no-such-host.invalid"


def hang(rank: int) -> None:
    if rank == 1:
        at(Processor, "encode", 2, 1, lambda *args, **kwargs: time.sleep(DEADLINE_S))


def full_disk(rank: int) -> None:
    """What the kernel says of a full disk, at the first save."""
    first = ".step_000002.partial"
    wrap(writing, "write_shard", lambda path, *rest: path.symlink_to("/dev/full") if first in str(path) else None)


def no_room(rank: int, log: Path, begin: int, end: int) -> None:
    """No file takes a byte from step ``begin`` on, until step ``end``; the log goes through a process of its own."""
    tee = subprocess.Popen(["tee", "-a", log], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert tee.stdin is not None
    for stream in (1, 2):
        os.dup2(tee.stdin.fileno(), stream)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def before(owner: Any, *rest: Any) -> None:
        step = next(value for value in rest if isinstance(value, int))
        if step in (begin, end):
            limit(0 if step == begin else resource.RLIM_INFINITY)

    wrap(coldstart.StepTrainer, "train", before)
    wrap(rollouts.Rollouts, "collect", before)


def poison_weights(rank: int) -> None:
    """A weight becomes infinite after step 3, at whose end there is a save."""

    def poison(checkpoints: CheckpointManager, done: int, final: bool, engines: dict[str, Engine], *rest: Any) -> None:
        if done == 4:
            engines["policy"].live.holdings[0].parameter.data.view(-1)[0] = float("inf")

    wrap(CheckpointManager, "end_step", poison)


def bad_gradient(rank: int, steps: range) -> None:
    """Not a number, on one rank before the replicas meet."""

    def poison(engine: Engine, *rest: Any, **kwargs: Any) -> None:
        if rank == 1 and moment["step"] in steps:
            trained = [h.parameter for h in engine.live.holdings if h.row.megatron in engine.trained]
            trained[0].main_grad.fill_(float("nan"))

    wrap(Engine, "_finalize_gradients", poison)


def wait_for(rank: int, ready: Path, go: Path) -> None:
    def pause(*rest: Any) -> None:
        ready.touch()
        while not go.exists():
            time.sleep(0.05)

    if rank == 0:
        at(Engine, "step", 2, 1, pause)


# Runs ----------------------------------------------------------------------------------------------------


def left_in_generation(out: Path) -> dict[str, Any]:
    """Leave PPO in the first iteration, in one after a save, in one after none, in an update, then go on to the end."""
    usr1, term = signal.SIGUSR1, signal.SIGTERM
    codes: dict[str, Any] = {}
    run = out / "left"
    for name, disturb in {
        "first": partial(warn_in_generation, number=usr1, victim=1, step=0),
        "saved": partial(warn_in_generation, number=usr1, victim=0, step=2),
        "unsaved": partial(warn_in_generation, number=term, victim=1, step=3),
        "update": partial(warn_in_update, number=usr1, victim=0, step=4),
    }.items():
        codes[name] = Run(run, disturb, stage="rl").codes()
        if (run / "checkpoints").exists():
            shutil.copytree(run / "checkpoints", out / f"left_{name}")
    codes["end"] = Run(run, stage="rl").codes()
    puzzle = "puzzle:digits?form=text&task=sum&split=heldout&answered=0&count=6"
    asked = ["evaluation.every=1", "evaluation.max_tokens=8", f"evaluation.sources=[{{path: '{puzzle}', name: text}}]"]
    run = out / "left_evaluation"
    codes["evaluation"] = Run(run, warn_in_evaluation, "iterations=2", *asked, stage="rl").codes()
    codes["evaluated_before"] = (run / "evaluation").exists()
    codes["evaluation_end"] = Run(run, None, "iterations=2", *asked, stage="rl").codes()
    return codes


def scenarios(out: Path) -> dict[str, Any]:
    codes: dict[str, Any] = {}
    codes["sync"] = Run(out / "sync", None, "run.async_save=false").codes()
    codes["usr1"] = Run(out / "signals", partial(warn, number=signal.SIGUSR1, victim=1, step=0)).codes()
    codes["term"] = Run(out / "signals", partial(warn, number=signal.SIGTERM, victim=0, step=2)).codes()
    codes["signals"] = Run(out / "signals").codes()
    # It mostly sleeps, so the next runs are made beside it; its exit codes are read with those of `waiting`.
    slow = Run(
        out / "slow", partial(slow_steps, steps=50, seconds=1.0), "run.hang_timeout_s=20", "iterations=2", stage="rl"
    )
    until = time.monotonic() + DEADLINE_S
    while not (out / "slow/metrics/train.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.1)
    codes["left"] = left_in_generation(out)
    ready, go = out / "ready", out / "go"
    first = Run(out / "locked", partial(wait_for, ready=ready, go=go))
    while not ready.exists():
        time.sleep(0.05)
    codes["second"] = Run(out / "locked", name="_second").codes()
    go.touch()
    codes["first"] = first.codes()
    # These wait for limits of time; other runs are made meanwhile, and the exit codes are read after them.
    waiting = {
        "slow": slow,
        "hang": Run(out / "hang", hang, "run.hang_timeout_s=15"),
        "hang_in_start": Run(out / "hang_in_start", hang_in_start, "run.hang_timeout_s=15"),
        "absent": Run(out / "absent", None, "run.hang_timeout_s=5", ranks=1),
        "elsewhere": Run(out / "elsewhere", elsewhere, "run.hang_timeout_s=5"),
    }
    codes["full"] = Run(out / "full", full_disk).codes()
    codes["full_stop"] = Run(out / "full_stop", full_disk, "run.stop_on_failed_save=true").codes()
    codes |= without_room(out)
    codes["infinite"] = Run(out / "infinite", poison_weights).codes()
    codes["skip"] = Run(out / "skip", partial(bad_gradient, steps=range(3, 4))).codes()
    stopping = "optimizer.stop_after_skipped=2"
    codes["diverge"] = Run(out / "diverge", partial(bad_gradient, steps=range(3, 6)), stopping).codes()
    codes |= with_other_folders(out)
    codes |= {name: run.codes() for name, run in waiting.items()}
    codes["other_stage"] = Run(out / "whole", name="_other_stage", stage="rl").codes()
    shutil.copytree(out / "whole", out / "other")
    shutil.rmtree(out / f"other/checkpoints/step_{STEPS:06d}")
    codes["other"] = Run(out / "other", None, "parallel.tp=2").codes()
    return codes


def without_room(out: Path) -> dict[str, Any]:
    """Runs on a disk that is full for two steps, and rollouts on one that stays full."""
    codes: dict[str, Any] = {}
    for name, stage in (("room", "coldstart"), ("rl_room", "rl")):
        full = partial(no_room, log=out / f"{name}.log", begin=2, end=4)
        codes[name] = Run(out / name, full, "run.async_save=false", stage=stage).codes()
    full = partial(no_room, log=out / "rolled.log", begin=1, end=9)
    alone = ("only=rollout", "iterations=2")
    codes["rolled_full"] = Run(out / "rolled", full, *alone, stage="rl").codes()
    codes["rolled"] = Run(out / "rolled", None, *alone, stage="rl").codes()
    return codes


def with_other_folders(out: Path) -> dict[str, Any]:
    """Runs whose checkpoint folder holds what is no checkpoint of theirs, beside one that is, and alone."""
    folder = out / "folders/checkpoints"
    shutil.copytree(out / "whole", out / "folders")
    newest = folder / f"step_{STEPS:06d}"
    shutil.copytree(newest, folder / "step_000004_backup")
    newer = json.loads((newest / "manifest.json").read_text()) | {"format": 2}
    (newest / "manifest.json").write_text(json.dumps(newer))
    shutil.copytree(folder / "step_000004/policy", folder / "step_000900/policy")
    write_manifest(folder / "step_000900", 900, {"average_of": ["a", "b"]})
    (folder / "step_000800/manifest.json").mkdir(parents=True)
    codes = {"folders": Run(out / "folders").codes()}
    for path in folder.glob("step_00000?"):
        shutil.rmtree(path)
    return codes | {"unusable": Run(out / "folders", name="_unusable").codes()}


def main(out: Path, seed: int, count: int, modes: list[str]) -> None:
    make_tiny_model(out / "model", tied=True, seed=5)
    results: dict[str, Any] = {}
    for mode in modes:
        whole = f"{mode}_whole"
        results[whole] = Run(out / whole, None, *MODES[mode].overrides, stage=MODES[mode].stage).codes()
        results[mode] = kills(out, seed, count, mode, whole)
    if not modes:
        results["whole"] = Run(out / "whole").codes()
        results["kills"] = kills(out, seed, count, "sft", "whole")
        # What runs that leave anywhere are compared with.
        every = ("run.save_every=1", "run.keep_last=0")
        results["rl_whole"] = Run(out / "rl_whole", None, *every, stage="rl").codes()
        results["rl_kills"] = kills(out, seed, count, "rl", "rl_whole")
        # One of the other ways of generating, another one each day.
        mode = WAYS[seed % len(WAYS)]
        results["way_whole"] = Run(out / "way_whole", None, *MODES[mode].overrides, stage="rl").codes()
        results["way_kills"] = kills(out, seed, count, mode, "way_whole")
        results |= scenarios(out)
    (out / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
