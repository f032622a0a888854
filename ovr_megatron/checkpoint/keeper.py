"""The end of a step, the same in both stages: publish what was written meanwhile, save where it is due, prune, stop."""

from __future__ import annotations

import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ovr_megatron.checkpoint import store
from ovr_megatron.checkpoint.manifest import CheckpointError
from ovr_megatron.checkpoint.store import Restored
from ovr_megatron.checkpoint.writing import DiskQueue, NonFiniteError, Writing
from ovr_megatron.config import ColdStartConfig, RLConfig
from ovr_megatron.engine import DivergenceError, Engine
from ovr_megatron.runtime import run_folder
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.stop import REQUEUE, Stop, StopRequest
from ovr_megatron.runtime.terminal import say
from ovr_megatron.weights.folder import WeightError
from ovr_megatron.weights.transfer import staged

_LEFT_OVER = re.compile(r"\.step_\d+\.(partial|old)")


@dataclass(frozen=True)
class Ended:
    """The folder of a run's last checkpoint, and the exit code that tells the launcher whether to come again.

    Without a checkpoint it is the folder of the run.
    """

    path: Path
    exit_code: int


def _link(source: str, target: str) -> None:
    """Weights without a second copy on the disk; what is small, and what people edit, as a copy."""
    if source.endswith(".safetensors"):
        try:
            os.link(source, target)
            return
        except OSError:  # a disk without links
            pass
    shutil.copy2(source, target)


class Keeper:
    """Checkpoints of one run and its orderly end.  Every method is a collective.

    Args:
        config: ``config.run.dir`` is locked for this job until the process ends.
        world: this process.

    Raises:
        RunLockedError: another job works on the run folder.
        ConfigError: the folder is one of another stage.
    """

    def __init__(self, config: ColdStartConfig | RLConfig, world: World):
        self.config, self.world = config.run, world
        self.run = Path(config.run.dir)
        self.directory = self.run / "checkpoints"
        self.stage = run_folder.stage_of(vars(config)) or ""
        run_folder.enter(self.run, self.stage, world.is_main)
        self.stop = StopRequest()
        self.queue = DiskQueue(int(config.run.save_buffer_gib * 2**30))
        self.writing: Writing | None = None
        self.last = 0  # step of the newest whole checkpoint
        self.stopped = Stop.NO
        self.seconds = 0.0  # that the last `after` took

    def resume(self, engines: dict[str, Engine]) -> Restored | None:
        """Load the newest whole checkpoint into ``engines``; None: there is none."""
        if self.world.is_main:
            for left_over in self.directory.glob(".step_*"):
                if _LEFT_OVER.fullmatch(left_over.name):
                    shutil.rmtree(left_over)
        found = store.find(self.directory, self.world, self.stage)
        if found:
            store.restore(found, engines)
            store.restore_generators(found, self.world)
            self.last = found.step
        return found

    def after(self, done: int, final: bool, engines: dict[str, Engine], state: dict[str, Any]) -> bool:
        """End step ``done`` (counted from 1); whether it was the last of this process.

        Args:
            done: steps done.
            final: whether it is the last.
            engines: what a checkpoint holds.
            state: the loop's cursors, as JSON.

        Raises:
            CheckpointError: a checkpoint could not be written and the run ends here, or is to end for that.
        """
        began = time.perf_counter()
        self.stopped, running = self._agree()
        if self.writing and not running:
            self._settle(ending=False)
        if final:
            self.stopped = Stop.NO
        ending = final or self.stopped > Stop.NO
        if ending or done % self.config.save_every == 0:
            if self.writing:
                self._settle(ending=False)
            self._start(done, engines, state)
            if ending or not self.config.async_save:
                self._settle(ending)
        self.seconds = time.perf_counter() - began
        return ending

    def leave(self, done: int, engines: dict[str, Engine], state: dict[str, Any]) -> None:
        """End a run that was asked to stop after ``done`` steps, within a step that has changed nothing yet.

        Nothing is written where the checkpoint of step ``done`` is there, or where no step is done: the same command
        then begins anew.  Arguments as of `after`.

        Raises:
            CheckpointError: the checkpoint could not be written.
        """
        self.stopped, _ = self._agree()
        if self.writing:
            self._settle(ending=False)
        if self.last < done:
            self._start(done, engines, state)
            self._settle(ending=True)

    def _start(self, done: int, engines: dict[str, Engine], state: dict[str, Any]) -> None:
        """Begin the checkpoint of step ``done``."""
        place = (self.world, self.queue, self.stage)
        self.writing = store.start(self.directory, done, engines, self.run / "companions", state, *place)

    def ended(self) -> Ended:
        """Say how the run ended."""
        self.queue.pool.shutdown()
        code = REQUEUE if self.stopped is Stop.LEAVE_AND_REQUEUE else 0
        return Ended(self.directory / f"step_{self.last:06d}" if self.last else self.run, code)

    def _export(self, ending: bool) -> None:
        """Keep the policy of the newest checkpoint as a Hugging Face folder, by hard links where the disk has them."""
        every, step = self.config.export_every, self.last
        if not self.world.is_main or not every or (step % every and not ending):
            return
        checkpoint = self.directory / f"step_{step:06d}"
        try:
            with staged(self.run / "exports" / checkpoint.name, [checkpoint], replace=True) as partial:
                shutil.copytree(checkpoint / "policy", partial, copy_function=_link, dirs_exist_ok=True)
        except (OSError, WeightError) as error:
            say(f"warning: step {step} was not exported: {error}")

    def _prune(self) -> None:
        if not self.world.is_main:
            return
        try:
            store.prune(self.directory, self.config.keep_last, self.config.keep_every, self.last)
        except OSError as error:
            say(f"warning: an old checkpoint stays, remove it by hand: {error}")

    def _agree(self) -> tuple[Stop, bool]:
        """What any rank was asked for, and whether any rank still writes."""
        running = self.writing is not None and self.writing.running
        flags = torch.tensor([int(self.stop.received), int(running)])
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return Stop(int(flags[0])), bool(flags[1])

    def _settle(self, ending: bool) -> None:
        """Wait for the files of all ranks and publish them."""
        assert self.writing is not None
        step = self.writing.step
        whole = f"the newest whole one is that of step {self.last}" if self.last else "there is none before it"
        try:
            problem = store.settle(self.writing, self.world)
        except NonFiniteError as error:
            raise DivergenceError(
                f"the checkpoint of step {step} is not kept: {error}. Training has diverged; {whole}: go on from there "
                "with a lower optimizer.lr or a tighter optimizer.skip_above"
            ) from error
        self.writing = None
        if problem is None:
            self.last = step
            self._export(ending)
            self._prune()
            return
        message = (
            f"the checkpoint of step {step} could not be written: {problem}. Nothing that was saved is lost: {whole}. "
            f"Make room in {self.directory} or lower run.keep_last"
        )
        if ending or self.config.stop_on_failed_save:
            raise CheckpointError(f"{message}, then start the same command again")
        if self.world.is_main:
            say(f"warning: {message}; training goes on to the next save")
