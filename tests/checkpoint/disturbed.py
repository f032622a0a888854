"""Runs of two ranks, of either stage, that are killed, stopped or starved: ``disturbed.py OUT SEED KILLS``.

One process imports everything and forks the ranks of each run, so that a run costs its training only. What disturbs a
run is wrapped around the package's functions in the child. Results go to ``OUT/results.json``.
"""

import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import OmegaConf

from ovr_megatron.checkpoint import writing
from ovr_megatron.checkpoint.manager import CheckpointManager
from ovr_megatron.checkpoint.manifest import write_manifest
from ovr_megatron.coldstart import training as coldstart
from ovr_megatron.config import ColdStartConfig, RLConfig, build, defaults
from ovr_megatron.data.processing import Processor
from ovr_megatron.engine import Engine
from ovr_megatron.evaluation import evaluator
from ovr_megatron.launch import RECIPES
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.ppo import archive, experience, grading, rollouts
from ovr_megatron.rl import training as rl
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.runtime.command import run_command

STEPS = 6
MOMENTS = ("data", "collective", "save", "manifest", "rename", "prune", "step")
RL_MOMENTS = ("generate", "grade", "exchange", "value", "update", "sync", "archive", "save", "manifest", "rename")
DEADLINE_S = 300.0
moment = {"step": 0}


def config(run: Path, model: Path, *overrides: str) -> ColdStartConfig:
    values = OmegaConf.load(RECIPES / "tiny_cold_start.yaml")
    values.pop("defaults")
    options = [f"run.dir={run}", f"model.path={model}", f"steps={STEPS}", "run.save_every=2", "data.pack_tokens=512"]
    options += ["run.keep_last=1", "run.keep_every=4", "run.export_every=2", "run.peak_tflops=0.01"]
    options += overrides
    return build(ColdStartConfig, OmegaConf.merge(defaults(ColdStartConfig), values, OmegaConf.from_dotlist(options)))


def rl_config(run: Path, model: Path, *overrides: str) -> RLConfig:
    values = OmegaConf.load(RECIPES / "tiny_rl.yaml")
    values.pop("defaults")
    options = [f"run.dir={run}", f"model.path={model}", f"iterations={STEPS}", "run.save_every=2", "run.keep_last=1"]
    options += ["run.keep_every=4", "prompts=4", "responses=2", "algorithm.critic_warmup_iterations=1", *overrides]
    options += ["curriculum=[{until: 3, max_tokens: 65}, {until: 6, max_tokens: 72}]"]
    return build(RLConfig, OmegaConf.merge(defaults(RLConfig), values, OmegaConf.from_dotlist(options)))


# Disturbances: each is called in a rank before it trains --------------------------------------------------


def wrap(owner: Any, name: str, before: Callable[..., None]) -> None:
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def at(owner: Any, name: str, step: int, number: int, action: Callable[..., None]) -> None:
    """Do ``action`` before call ``number`` (from 1) of a function in step ``step`` (from 0)."""
    seen = {"calls": 0}

    def before(*args: Any, **kwargs: Any) -> None:
        seen["calls"] += moment["step"] == step
        if moment["step"] == step and seen["calls"] == number:
            action(*args, **kwargs)

    wrap(owner, name, before)


def die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_the_file(path: Path, *args: Any, **kwargs: Any) -> None:
    path.write_bytes(b"half a shard")
    die()


def die_after_the_manifest(partial: Path, *args: Any, **kwargs: Any) -> None:
    if partial.name.endswith(".partial") and (partial / "manifest.json").exists():
        die()


def is_doomed(path: Path) -> bool:
    return path.name.endswith(".old") and path.exists()


def kill(rank: int, kind: str, victim: int, step: int, number: int) -> None:
    """SIGKILL of ``victim``; where only the first rank passes, it is the first."""
    saves = step - step % 2 + 1  # the step at whose end there is a save
    match kind:
        case "data" if rank == victim:
            at(Processor, "encode", step, 1, die)
        case "collective" if rank == victim:
            at(dist, "all_reduce", step, number, die)
        case "generate" if rank == victim:  # in the middle: some responses are there, others are not
            at(RolloutEngine, "room_left", step, 5 * number, die)
        case "grade" if rank == victim:
            at(grading.RoundGrading, "_submit", step, number, die)
        case "exchange" if rank == victim:
            at(experience, "exchange", step, 1, die)
        case "value" if rank == victim:
            at(Engine, "scores", step, 1, die)
        case "update" if rank == victim:
            at(Engine, "step", step, number, die)
        case "sync" if rank == victim:
            at(RolloutEngine, "update", step, 1, die)
        case "archive" if rank == victim:
            at(archive, "write_arrays", step, 1, lambda path, *rest: die_in_the_file(path))
        case "step" if rank == victim:
            at(Engine, "step", step, 1, die)
        case "save" if rank == victim:
            wrap(writing, "write_shard", lambda path, *r: die_in_the_file(path) if moment["step"] >= saves else None)
        case "manifest" if rank == 0:
            wrap(writing, "write_manifest", lambda *rest: die() if moment["step"] >= step else None)
        case "rename" if rank == 0:
            wrap(writing, "sync", lambda path: die_after_the_manifest(path) if moment["step"] >= step else None)
        case "prune" if rank == 0:
            wrap(writing.shutil, "rmtree", lambda path, **rest: die() if is_doomed(Path(path)) else None)


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


class Run:
    """Two ranks on one run folder, at work from the beginning."""

    def __init__(
        self,
        out: Path,
        disturb: Callable[[int], None] | None = None,
        *overrides: str,
        name: str = "",
        stage: str = "coldstart",
        ranks: int = 2,
    ):
        self.out, self.log = out, out.with_name(f"{out.name}{name}.log")
        compose = {"coldstart": config, "rl": rl_config}[stage]
        settings = compose(out, out.parent / "model", *overrides)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pids = [self._fork(rank, port, settings, disturb) for rank in range(ranks)]

    def _fork(
        self, rank: int, port: int, settings: ColdStartConfig | RLConfig, disturb: Callable[[int], None] | None
    ) -> int:
        sys.stdout.flush()
        if pid := os.fork():
            return pid
        code = 1
        try:
            file = os.open(self.log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            wrap(coldstart.StepTrainer, "train", lambda trainer, step, *rest: moment.update(step=step))
            if disturb:
                disturb(rank)
            wrap(rl, "iterate", lambda models, rollouts, draw, iteration: moment.update(step=iteration))
            run_command(partial(rl.run if isinstance(settings, RLConfig) else coldstart.run, settings))
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def codes(self) -> list[int]:
        """Exit codes of the ranks, those of signals negative; whoever takes too long is killed."""
        until = time.monotonic() + DEADLINE_S
        ended: dict[int, int] = {}
        while len(ended) < len(self.pids):
            for pid in self.pids:
                if pid not in ended and (found := os.waitpid(pid, os.WNOHANG))[0]:
                    ended[pid] = os.waitstatus_to_exitcode(found[1])
            if time.monotonic() > until:
                for pid in set(self.pids) - set(ended):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        return [ended[pid] for pid in self.pids]


def kills(out: Path, seed: int, count: int, stage: str = "coldstart") -> list[dict[str, Any]]:
    """Kill ``count`` runs at moments drawn from ``seed``, and let each go on to its end."""
    generator = random.Random(seed)
    moments = MOMENTS if stage == "coldstart" else RL_MOMENTS
    kinds = [moments[(seed + number) % len(moments)] for number in range(count)]
    found = []
    for number, kind in enumerate(kinds):
        where = {"kind": kind, "victim": generator.randrange(2), "step": generator.randrange(1, STEPS)}
        where["number"] = generator.randrange(1, 4)
        run = out / f"{stage}_kill_{number}"
        codes = Run(run, partial(kill, **where), stage=stage).codes()
        saved = sorted(path.name for path in (run / "checkpoints").glob("*"))
        entry = {**where, "run": run.name, "killed": codes, "saved": saved, "resumed": Run(run, stage=stage).codes()}
        print(json.dumps(entry), flush=True)
        found.append(entry)
    return found


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
    # It mostly sleeps, so the next runs are made beside it.
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
    codes["slow"] = slow.codes()
    waiting = {
        "hang": Run(out / "hang", hang, "run.hang_timeout_s=15"),
        "hang_in_start": Run(out / "hang_in_start", hang_in_start, "run.hang_timeout_s=15"),
        "absent": Run(out / "absent", None, "run.hang_timeout_s=5", ranks=1),
        "elsewhere": Run(out / "elsewhere", elsewhere, "run.hang_timeout_s=5"),
    }
    codes |= {name: run.codes() for name, run in waiting.items()}
    codes["full"] = Run(out / "full", full_disk).codes()
    codes["full_stop"] = Run(out / "full_stop", full_disk, "run.stop_on_failed_save=true").codes()
    codes |= without_room(out)
    codes["infinite"] = Run(out / "infinite", poison_weights).codes()
    codes["skip"] = Run(out / "skip", partial(bad_gradient, steps=range(3, 4))).codes()
    stopping = "optimizer.stop_after_skipped=2"
    codes["diverge"] = Run(out / "diverge", partial(bad_gradient, steps=range(3, 6)), stopping).codes()
    codes |= with_other_folders(out)
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


def main(out: Path, seed: int, count: int) -> None:
    make_tiny_model(out / "model", tied=True, seed=5)
    whole = Run(out / "whole").codes()
    results = {"whole": whole, "kills": kills(out, seed, count)}
    every = ("run.save_every=1", "run.keep_last=0")  # what runs that leave anywhere are compared with
    results |= {
        "rl_whole": Run(out / "rl_whole", None, *every, stage="rl").codes(),
        "rl_kills": kills(out, seed, count, "rl"),
    }
    if len(sys.argv) < 5:
        results |= scenarios(out)
    (out / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
