"""Train on packed samples of text, images and video: supervised fine-tuning (SFT)."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from ovr_megatron.chat_model import ChatModel
from ovr_megatron.checkpoint import store
from ovr_megatron.checkpoint.conversion import export_model
from ovr_megatron.checkpoint.manager import CheckpointManager, RunResult
from ovr_megatron.checkpoint.resume import ResumePoint
from ovr_megatron.coldstart.setup import (
    build_evaluation,
    load_position,
    load_weights,
    open_data,
    record_run,
    show_start,
)
from ovr_megatron.coldstart.step_trainer import StepTrainer
from ovr_megatron.coldstart.validation import open_validation
from ovr_megatron.config import ColdStartConfig, ConfigError, RLConfig
from ovr_megatron.data.chats import Conversation, read_chats
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.supervised import ChatPacks, StepPacks, has_data, missing_data
from ovr_megatron.engine import Engine
from ovr_megatron.runtime import distributed
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.logs import set_step
from ovr_megatron.runtime.progress import Progress
from ovr_megatron.runtime.starts import LaunchArgs
from ovr_megatron.runtime.stop import Stop, StopRequested
from ovr_megatron.runtime.terminal import say
from ovr_megatron.runtime.trackers.table import check_trackers


def train(config: ColdStartConfig, world: World, launch: LaunchArgs | None = None) -> RunResult:
    """Train to the last step, or until a signal comes, from the newest checkpoint if there is one.  A collective."""
    with SFT(config, world, launch) as sft:
        return sft.run()


class SFT:
    """Supervised training of a run, step by step or to its end.  Every method is a collective.

    It goes on from the newest checkpoint of ``run.dir``.  Use it in a ``with`` block, or call `close`.

    Attributes:
        config: the settings; ``steps`` is the number of steps, also where it follows from the epochs.
        world: this process.
        policy: the model that trains, for log-probabilities and samples between the steps.
        next_step: index of the next step, from 0.
    """

    def __init__(
        self,
        config: ColdStartConfig | RLConfig,
        world: World | None = None,
        launch: LaunchArgs | None = None,
    ):
        """Load the model and open data, log and checkpoints.

        Args:
            config: settings of a recipe.  Without ``data.sources`` and ``data.tokenised`` the program passes the chats
                of each step.
            world: the ranks, where the program has joined them already.
            launch: recipe and overrides of a command line, for the run's record.

        Raises:
            UserError: a setting, the model, the data or the run folder cannot work.
        """
        if not isinstance(config, ColdStartConfig):
            raise ConfigError("SFT takes settings of `ovr sft`, and these are of `ovr rl`; compose another recipe")
        check_trackers(config.run.trackers)
        with ExitStack() as resources:
            if world is None:
                world = resources.enter_context(distributed.process_group(config.run, config.parallel))
            self.world = world
            self.checkpoints = CheckpointManager(config, world)
            if launch is None:
                # A command's process ends with its run: until then a signal must not change the exit code.
                resources.callback(self.checkpoints.stop.close)
            model_folder = store.weights_of(config.model.path)
            processor = Processor(model_folder, config.data)
            self.packs, steps = open_data(config, processor, world)
            config = dataclasses.replace(config, steps=steps)  # with steps=0 those of the epochs
            self.config = config
            engine = Engine(processor.shape, config.model, config.parallel, world)
            engine.with_optimizer(config.optimizer, config.steps)
            self.policy = ChatModel(engine, processor, config, world, model_folder)
            checkpoint = self._load(engine)
            self.next_step = checkpoint.step if checkpoint else 0
            if world.is_main:
                record_run(config, processor, world, launch)
                show_start(config, processor, engine, world, checkpoint, self.packs)
            self.trainer = StepTrainer(config, engine, world, checkpoint)
            self.validation = open_validation(config, processor, engine, world)
            self.evaluation = build_evaluation(config, self.policy) if config.evaluation.every else None
            self._may_lack_scores = True
            self._stopped = False
            self._resources = resources.pop_all()

    def _load(self, engine: Engine) -> ResumePoint | None:
        """Load the newest checkpoint and return it, or the initial weights."""
        config = self.config
        if config.model.lora.rank:
            # The weights beside adapters are in no checkpoint.
            load_weights(engine, config, self.world)
        checkpoint = self.checkpoints.resume({"policy": engine})
        if checkpoint:
            load_position(self.packs, checkpoint)
        elif not config.model.lora.rank:
            load_weights(engine, config, self.world)
        return checkpoint

    @property
    def done(self) -> bool:
        """Whether no step is left, or a signal has ended the run."""
        return self._stopped or self.next_step >= self.config.steps

    @property
    def stopped(self) -> bool:
        """Whether a signal has ended the run before its last step; the same program, started again, goes on."""
        return self.checkpoints.stopped > Stop.NO

    def result(self) -> RunResult:
        """Return the last checkpoint and the exit code, 75 where the run is to be started again; call it at the end."""
        return self.checkpoints.result()

    def run(self) -> RunResult:
        """Train to the last step, or until a signal comes; return the result of the run."""
        if self.packs is None:
            raise missing_data()
        name = Path(self.config.run.dir).name
        with Progress(self.config.steps, name, "step", self.world.is_main, self.next_step) as progress:
            self._score_resumed()
            while not self.done:
                metrics = self.step()
                progress.update(loss=f"{metrics['loss']:.4f}")
        return self.checkpoints.result()

    def step(self, chats: Sequence[Conversation] | None = None) -> dict[str, float]:
        """Train one step, log it, and evaluate and save where they are due; return the engine's metrics.

        Args:
            chats: all that the step learns from, the same on every rank; None takes the next packs of the data, whose
                order does not depend on steps with chats.

        Returns:
            ``loss`` (mean of a target), ``count`` (of targets), ``lr``, ``grad_norm``, and whether it was ``skipped``.

        Raises:
            ConfigError: the run is done, a signal has ended it, or there are neither chats nor data.
            RowError: a chat cannot be used.
        """
        if self.stopped:
            raise ConfigError(
                f"{self.config.run.dir}: a signal has ended the run; start the same program again to go on"
            )
        if self.done:
            raise ConfigError(f"{self.config.run.dir}: all {self.config.steps} steps are done; raise steps")
        self._score_resumed()
        set_step(self.next_step)
        metrics = self.trainer.train(self.next_step, self._step_packs(chats), self.checkpoints.save_seconds)
        self.next_step += 1
        is_last = self.next_step == self.config.steps
        # Before `end_step`: a checkpoint is resumed from after its losses are in the log.
        if self.validation and self.validation.due(self.next_step, is_last):
            self.trainer.record_scores(self.next_step - 1, self.validation.losses())
        if self.evaluation and self.evaluation.due(self.next_step, is_last):
            self.evaluation.engine.update(self.policy.engine.held())
            with suppress(StopRequested):  # `end_step` ends the run, and its next start scores these weights
                # Scores of the last step are made whatever signal comes: no later start would make them.
                stop = None if is_last else self.checkpoints.stop
                self.trainer.record_scores(self.next_step - 1, self.evaluation.scores(self.next_step, stop))
        self._stopped = self.checkpoints.end_step(self.next_step, is_last, self._engines, self._state())
        return metrics

    def _step_packs(self, chats: Sequence[Conversation] | None) -> StepPacks:
        if chats is not None:
            data = self.config.data
            dp = (self.world.dp_rank, self.world.dp_size)
            return ChatPacks(read_chats(chats), self.policy.processor, data.pack_tokens, *dp)
        if self.packs is None:
            raise missing_data()
        return self.packs

    def _score_resumed(self) -> None:
        """Score the checkpoint that the run goes on from, if its scores are missing."""
        # An earlier start may have saved this checkpoint and ended before it was scored.
        if self.evaluation and self._may_lack_scores and self.evaluation.is_missing(self.next_step):
            self.evaluation.engine.update(self.policy.engine.held())
            self.trainer.record_scores(self.next_step - 1, self.evaluation.scores(self.next_step))
        self._may_lack_scores = False

    @property
    def _engines(self) -> dict[str, Engine]:
        return {"policy": self.policy.engine}

    def _state(self) -> dict[str, object]:
        """Return the cursors of a checkpoint."""
        position = None if self.packs is None else self.packs.state()
        return {"packs": position, "spikes": self.trainer.spikes.state()}

    def save(self) -> Path:
        """Save a checkpoint of the steps done, unless it is there, and return its folder.

        Raises:
            CheckpointError: no step is done, or it could not be written.
        """
        return self.checkpoints.save(self.next_step, self._engines, self._state())

    def export(self, out: str | Path, dtype: str | None = None) -> None:
        """Save, and write the model as a Hugging Face folder, adapters merged.

        Args:
            out: a folder that is not there yet.
            dtype: of its weights; by default that of the run.

        Raises:
            CheckpointError: no step is done, or the checkpoint could not be written.
        """
        export_model(self.save(), out, dtype)

    def close(self) -> None:
        """Publish the checkpoint that is being written, close the log and leave the other ranks."""
        # The stack gets an error of these, after which other ranks may not come to the collectives of an orderly end.
        with self._resources:
            try:
                self.checkpoints.finish_pending()
            finally:
                self.checkpoints.result()
                self.trainer.close()

    def __enter__(self) -> Self:
        """Return the run itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        # After an error other ranks may not come to the collectives of an orderly end.
        self._resources.__exit__(kind, error, traceback)


def run(config: ColdStartConfig, launch: LaunchArgs | None = None) -> int:
    """Join the process group, train, and print the path of the result; return the exit code."""
    if not has_data(config.data):
        raise missing_data()
    with SFT(config, launch=launch) as sft:
        result = sft.run()
        if sft.world.is_main:
            say(f"sft: {result.path}", sys.stdout)
    return result.exit_code
