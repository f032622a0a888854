"""End each step of a stage: publish the checkpoint written meanwhile, save where it is due, prune, stop."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ovr_megatron.checkpoint import store
from ovr_megatron.checkpoint.manifest import CheckpointError
from ovr_megatron.checkpoint.resume import ResumePoint
from ovr_megatron.checkpoint.writing import DiskQueue, NonFiniteError, PendingSave
from ovr_megatron.config import ColdStartConfig, RLConfig
from ovr_megatron.engine import DivergenceError, Engine
from ovr_megatron.runtime import run_folder
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.logs import get_logger
from ovr_megatron.runtime.stop import REQUEUE, Stop, StopRequest
from ovr_megatron.weights.folder import WeightError
from ovr_megatron.weights.transfer import staged

logger = get_logger(__name__)

_LEFT_OVER = re.compile(r"\.step_\d+\.(partial|old)")


@dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Attributes:
        path: the folder of its last checkpoint, without one the folder of the run.
        exit_code: tells the launcher whether to start the run again.
    """

    path: Path
    exit_code: int


def _link(source: str, target: str) -> None:
    """Hard-link weight shards and copy everything else, which is small and may be edited."""
    if source.endswith(".safetensors"):
        try:
            os.link(source, target)
            return
        except OSError:  # a disk without links
            pass
    shutil.copy2(source, target)


class CheckpointManager:
    """Saves and resumes one run and ends it in order.  Every method is a collective.

    Args:
        config: ``config.run.dir`` is locked for this job until the process ends.
        world: this process.

    Raises:
        RunLockedError: another job works on the run folder.
        ConfigError: the folder is one of another stage.
    """

    def __init__(self, config: ColdStartConfig | RLConfig, world: World):
        self.config = config.run
        self.world = world
        self.run = Path(config.run.dir)
        self.directory = self.run / "checkpoints"
        self.stage = run_folder.stage_of(vars(config)) or ""
        run_folder.enter(self.run, self.stage, world.is_main)
        self.stop = StopRequest()
        self.queue = DiskQueue(int(config.run.save_buffer_gib * 2**30))
        self.pending: PendingSave | None = None  # the save in progress
        self.last_step = 0  # of the newest complete checkpoint
        self.stopped = Stop.NO
        self.save_seconds = 0.0  # that the last `end_step` took
        # Returns what of the loop's state goes into a checkpoint as arrays: those of this rank.
        self.loop_arrays: Callable[[], Mapping[str, Tensor]] | None = None

    def resume(self, engines: dict[str, Engine]) -> ResumePoint | None:
        """Load the newest complete checkpoint into ``engines`` and return it; None: there is none."""
        if self.world.is_main:
            # The lock on the run folder is held, so no other job is writing these.
            for folder in self.directory.glob(".step_*"):
                if _LEFT_OVER.fullmatch(folder.name):
                    shutil.rmtree(folder)
        checkpoint = store.find(self.directory, self.world, self.stage)
        if checkpoint:
            store.restore(checkpoint, engines)
            # Last: nothing may draw from them after that.
            store.restore_generators(checkpoint, self.world)
            self.last_step = checkpoint.step
        return checkpoint

    def end_step(self, done: int, final: bool, engines: dict[str, Engine], state: Mapping[str, Any]) -> bool:
        """End step ``done`` (counted from 1) and return whether it was the last of this process.

        Args:
            done: steps done.
            final: whether it is the last.
            engines: the models of a checkpoint, by name.
            state: the loop's cursors, as JSON.

        Raises:
            CheckpointError: a checkpoint could not be written and the run ends here, or is to end for that.
        """
        began = time.perf_counter()
        self.stopped, running = self._agree()
        if self.pending and not running:
            self._finish_save(ending=False)
        if final:
            self.stopped = Stop.NO  # a signal during the last step changes nothing: the run is finished
        ending = final or self.stopped > Stop.NO
        is_due = done % self.config.save_every == 0
        if ending or is_due:
            # There is one save at a time: the one before is published first.
            self.finish_pending()
            self._start_save(done, engines, state)
            if ending or not self.config.async_save:
                self._finish_save(ending)
        self.save_seconds = time.perf_counter() - began
        return ending

    def stop_early(self, done: int, engines: dict[str, Engine], state: Mapping[str, Any]) -> None:
        """End a run that was asked to stop after ``done`` steps, within a step that has changed nothing yet.

        Nothing is written where the checkpoint of step ``done`` is there, or where no step is done: the same command
        then begins anew.  The arguments are those of `end_step`.

        Raises:
            CheckpointError: the checkpoint could not be written.
        """
        self.stopped, _ = self._agree()
        self._save_missing(done, engines, state)

    def save(self, done: int, engines: dict[str, Engine], state: Mapping[str, Any]) -> Path:
        """Save step ``done`` now, unless its checkpoint is there; return its folder.

        The arguments are those of `end_step`.

        Raises:
            CheckpointError: no step is done, or the checkpoint could not be written.
        """
        if not done:
            raise CheckpointError(f"{self.run}: no step is done, so there is no checkpoint to save; train one first")
        self._save_missing(done, engines, state)
        return self.directory / f"step_{done:06d}"

    def _save_missing(self, done: int, engines: dict[str, Engine], state: Mapping[str, Any]) -> None:
        """Publish the save in progress, and save step ``done`` where that was not it."""
        self.finish_pending()
        if self.last_step < done:
            self._start_save(done, engines, state)
            self._finish_save(ending=True)

    def finish_pending(self) -> None:
        """Publish the save in progress, if there is one."""
        if self.pending:
            self._finish_save(ending=False)

    def _start_save(self, done: int, engines: dict[str, Engine], state: Mapping[str, Any]) -> None:
        """Begin the checkpoint of step ``done``."""
        hf_assets = self.run / "companions"
        arrays = self.loop_arrays() if self.loop_arrays else {}
        self.pending = store.start_save(
            self.directory, done, engines, hf_assets, state, self.world, self.queue, self.stage, arrays
        )

    def result(self) -> RunResult:
        """Close the queue and return how the run ended."""
        self.queue.pool.shutdown()
        code = REQUEUE if self.stopped is Stop.LEAVE_AND_REQUEUE else 0
        path = self.run
        if self.last_step:
            path = self.directory / f"step_{self.last_step:06d}"
        return RunResult(path, code)

    def _export(self, ending: bool) -> None:
        """Export the newest policy as a Hugging Face folder, by hard links where the disk has them (`_link`)."""
        every = self.config.export_every
        step = self.last_step
        if not self.world.is_main or not every or (step % every and not ending):
            return
        checkpoint = self.directory / f"step_{step:06d}"
        # An export is a convenience: training goes on where it fails.
        out = self.run / "exports" / checkpoint.name
        try:
            with staged(out, [checkpoint], replace=True) as partial:
                shutil.copytree(checkpoint / "policy", partial, copy_function=_link, dirs_exist_ok=True)
        except (OSError, WeightError) as error:
            logger.warning(f"step {step} was not exported: {error}")

    def _prune(self) -> None:
        if not self.world.is_main:
            return
        config = self.config
        try:
            store.prune(self.directory, config.keep_last, config.keep_every, self.last_step)
        except OSError as error:
            logger.warning(f"an old checkpoint stays, remove it by hand: {error}")

    def _agree(self) -> tuple[Stop, bool]:
        """Return the strongest stop request of any rank, and whether any rank still writes."""
        running = self.pending is not None and self.pending.running
        # Signals and disks do not reach all ranks at the same step, and what follows are collectives.
        flags = torch.tensor([int(self.stop.received), int(running)])
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        strongest, any_running = flags.tolist()
        return Stop(strongest), bool(any_running)

    def _finish_save(self, ending: bool) -> None:
        """Wait for the files of all ranks and publish them."""
        assert self.pending is not None
        step = self.pending.step
        newest = "there is none before it"
        if self.last_step:
            newest = f"the newest whole one is that of step {self.last_step}"
        try:
            problem = store.finish_save(self.pending, self.world)
        except NonFiniteError as error:
            raise DivergenceError(
                f"the checkpoint of step {step} is not kept: {error}. Training has diverged; {newest}: go on from "
                "there with a lower optimizer.lr or a tighter optimizer.skip_above"
            ) from error
        self.pending = None
        if problem is None:
            self.last_step = step
            self._export(ending)
            self._prune()
            return
        message = (
            f"the checkpoint of step {step} could not be written: {problem}. Nothing that was saved is lost: {newest}. "
            f"Make room in {self.directory} or lower run.keep_last"
        )
        if ending or self.config.stop_on_failed_save:
            raise CheckpointError(f"{message}, then start the same command again")
        if self.world.is_main:
            logger.warning(f"{message}; training goes on to the next save")
