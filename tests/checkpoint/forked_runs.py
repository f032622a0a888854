"""Run folders that forked ranks work on, so that a run costs its training only, and wrappers that disturb a rank."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ovr_megatron.coldstart import training as coldstart
from ovr_megatron.config import ColdStartConfig, RLConfig, build, defaults
from ovr_megatron.launch import RECIPES
from ovr_megatron.ppo.rollouts import Rollouts
from ovr_megatron.rl import training as rl
from ovr_megatron.runtime.command import run_command
from tests.forked import run_to_exit

STEPS = 6
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
        self.pids = [self._fork(partial(self._work, rank, ranks, port, settings, disturb)) for rank in range(ranks)]

    def _fork(self, work: Callable[[], None]) -> int:
        sys.stdout.flush()
        if pid := os.fork():
            return pid
        run_to_exit(work)

    def _work(
        self,
        rank: int,
        ranks: int,
        port: int,
        settings: ColdStartConfig | RLConfig,
        disturb: Callable[[int], None] | None,
    ) -> None:
        """Do a rank's part of the run."""
        file = os.open(self.log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        wrap(coldstart.StepTrainer, "train", lambda trainer, step, *rest: moment.update(step=step))
        if disturb:
            disturb(rank)
        wrap(rl, "iterate", lambda models, rollouts, draw, iteration: moment.update(step=iteration))
        wrap(rl, "iterate_split", lambda models, others, draw, iteration, *rest: moment.update(step=iteration))
        if isinstance(settings, RLConfig) and rank >= ranks - settings.rollout.ranks:
            wrap(Rollouts, "collect", lambda owner, draw, iteration, *rest: moment.update(step=iteration))
        run_command(partial(rl.run if isinstance(settings, RLConfig) else coldstart.run, settings))

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
