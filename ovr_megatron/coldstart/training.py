"""Train on packed samples of text, images and video: supervised fine-tuning (SFT)."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import Tensor

from ovr_megatron.checkpoint import store
from ovr_megatron.checkpoint.hf_assets import write_hf_assets
from ovr_megatron.checkpoint.manager import CheckpointManager, RunResult
from ovr_megatron.checkpoint.resume import ResumePoint
from ovr_megatron.coldstart.balance import row_work
from ovr_megatron.coldstart.validation import open_validation
from ovr_megatron.config import ColdStartConfig
from ovr_megatron.data.document_losses import DocumentLoss, DocumentLosses, by_source, merge_parts, worst
from ovr_megatron.data.epochs import EpochStream
from ovr_megatron.data.packing import Pack
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.schema import RowError
from ovr_megatron.data.skipped import SkippedRows
from ovr_megatron.data.stream import open_stream
from ovr_megatron.data.supervised import SupervisedPacks, open_packs
from ovr_megatron.engine import Engine, LossSum
from ovr_megatron.families import ModelShape
from ovr_megatron.model.flops import training_flops
from ovr_megatron.model.layers import cautions, layers_in_use
from ovr_megatron.model.scores import Scores
from ovr_megatron.plan.heading import run_rows, show_heading, source_rows
from ovr_megatron.runtime import distributed, run_folder
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.logs import get_logger, set_step
from ovr_megatron.runtime.progress import Progress
from ovr_megatron.runtime.runlog import open_log, record_layers
from ovr_megatron.runtime.spikes import SpikeWatch
from ovr_megatron.runtime.starts import LaunchArgs, record_start
from ovr_megatron.runtime.steps import RankStep, gather, matrix_rate, memory_peaks, rank_metrics
from ovr_megatron.runtime.stop import StopRequested
from ovr_megatron.runtime.terminal import say
from ovr_megatron.runtime.trackers.table import check_trackers
from ovr_megatron.runtime.watchdog import Watchdog
from ovr_megatron.weights.folder import WeightFolder

if TYPE_CHECKING:
    from ovr_megatron.evaluation.periodic import PeriodicEvaluation

logger = get_logger(__name__)

SPIKE_DOCUMENTS = 16  # documents that the record of a spike names
LENGTHS_MEASURED = 64  # rows whose mean length estimates the epochs in the heading


def cross_entropy(scores: Scores, pack: Pack) -> LossSum:
    """Return the negative log-likelihood of the labelled tokens, summed: every token of a step weighs the same."""
    assert scores.logprobs is not None
    return LossSum(-scores.logprobs.sum(), len(scores.rows), {})


def train(config: ColdStartConfig, world: World, launch: LaunchArgs | None = None) -> RunResult:
    """Train to the last step, or until a signal comes, from the newest checkpoint if there is one.  A collective."""
    run = Path(config.run.dir)
    checkpoints = CheckpointManager(config, world)
    model_folder = store.weights_of(config.model.path)
    processor = Processor(model_folder, config.data)
    shape = ModelShape.from_hf(model_folder)
    packs, steps = open_packs(config, processor, world, row_work(config, processor, shape))
    config = dataclasses.replace(config, steps=steps)  # with steps=0 those of the epochs
    engine = Engine(shape, config.model, config.parallel, world)
    engine.with_optimizer(config.optimizer, config.steps)
    engines = {"policy": engine}
    if config.model.lora.rank:
        # The weights beside adapters are in no checkpoint.
        load_weights(engine, config, world)
    checkpoint = checkpoints.resume(engines)
    first_step = 0
    if checkpoint:
        first_step = checkpoint.step
        packs.load(checkpoint.state["packs"])
    elif not config.model.lora.rank:
        load_weights(engine, config, world)
    if world.is_main:
        run_folder.record(config, run)
        layers = layers_in_use(config.model)
        record_layers(run, layers, cautions(config.model, rollout=False))
        if launch:
            record_start(run, launch, world.size)
        write_hf_assets(run / "companions", processor)
        show_start(config, processor, engine, world, checkpoint, packs)
    trainer = StepTrainer(config, engine, world, checkpoint)
    validation = open_validation(config, processor, engine, world)
    evaluation = None
    if config.evaluation.every:
        evaluation = build_evaluation(config, model_folder, processor)

    with Progress(config.steps, run.name, "step", world.is_main, first_step) as progress:
        # An earlier start may have saved this checkpoint and ended before it was scored.
        if evaluation and evaluation.is_missing(first_step):
            evaluation.engine.update(engine.held())
            trainer.record_scores(first_step - 1, evaluation.scores(first_step))
        for step in range(first_step, config.steps):
            set_step(step)
            metrics = trainer.train(step, packs, checkpoints.save_seconds)
            progress.update(loss=f"{metrics['loss']:.4f}")
            steps_done = step + 1
            is_last = steps_done == config.steps
            # Before `end_step`: a checkpoint is resumed from after its losses are in the log.
            if validation and validation.due(steps_done, is_last):
                trainer.record_scores(step, validation.losses())
            if evaluation and evaluation.due(steps_done, is_last):
                evaluation.engine.update(engine.held())
                with suppress(StopRequested):  # `end_step` ends the run, and its next start scores these weights
                    stop = None if is_last else checkpoints.stop
                    trainer.record_scores(step, evaluation.scores(steps_done, stop))
            state = {"packs": packs.state(), "spikes": trainer.spikes.state()}
            if checkpoints.end_step(steps_done, is_last, engines, state):
                break
    trainer.close()
    return checkpoints.result()


def load_weights(engine: Engine, config: ColdStartConfig, world: World) -> None:
    """Load the initial weights of ``model.path``.  A collective.

    Raises:
        CheckpointError: it is a checkpoint that is damaged.
    """
    store.check_weights(config.model.path, world)
    engine.load(WeightFolder(store.weights_of(config.model.path)), seed=config.run.seed)


def show_start(
    config: ColdStartConfig,
    processor: Processor,
    engine: Engine,
    world: World,
    checkpoint: ResumePoint | None,
    packs: SupervisedPacks,
) -> None:
    """Print the heading of the run: batch, data, model, and the checkpoint that it goes on from."""
    step_tokens = config.packs_per_step * config.data.pack_tokens
    batch = f"{config.packs_per_step} packs of {config.data.pack_tokens:,} = {step_tokens:,} tokens a step"
    rows = [("batch", batch)]
    if isinstance(packs, EpochStream):
        rows.append(("data", describe_epochs(config, packs)))
    else:
        sample_count = config.steps * step_tokens / mean_length(config, processor)
        rows += source_rows(config, sample_count)
    start = None
    if checkpoint:
        start = (checkpoint.path, checkpoint.step)
    rows += run_rows(config, {"model": engine}, world, start)
    heading = show_heading(f"SFT in {config.run.dir}", rows)
    logger.info(heading)


def describe_epochs(config: ColdStartConfig, packs: EpochStream) -> str:
    """Return the rows of an epoch, its steps, and how many epochs the run takes."""
    source = config.data.tokenised or "data.sources"
    rows = f"{source}: {packs.trained_rows:,} rows to train on, {packs.dropped:,} left out"
    if not packs.epoch_steps:  # with very small weights an epoch may have no row
        return rows
    epochs = config.steps / packs.epoch_steps
    return f"{rows}; an epoch takes {packs.epoch_steps:,.1f} steps, the run {epochs:,.1f} epochs"


def mean_length(config: ColdStartConfig, processor: Processor) -> float:
    """Return the mean number of tokens of the first samples; the length of a pack if none of them can be used."""
    lengths = []
    # A stream of its own: the samples measured here are not taken from the training packs.
    stream = open_stream(config.data, config.run.seed, SkippedRows(None))
    for row in islice(stream, LENGTHS_MEASURED):
        try:
            [length] = processor.lengths([row], generation=False)
        except RowError:
            continue  # the loop itself names the row and stops, or skips it
        if isinstance(length, int):
            lengths.append(length)
    if not lengths:
        return float(config.data.pack_tokens)
    return statistics.mean(lengths)


def build_evaluation(
    config: ColdStartConfig,
    model_folder: Path,
    processor: Processor,
) -> PeriodicEvaluation:
    """Start vLLM on this rank; it sleeps between the evaluations."""
    # Imported here, so that a run without evaluation does not wait for vLLM.
    from ovr_megatron.evaluation.periodic import PeriodicEvaluation  # noqa: PLC0415
    from ovr_megatron.rollout.engine import RolloutEngine  # noqa: PLC0415

    shape = processor.shape
    prompt_tokens = config.data.max_prompt_tokens
    response_tokens = shape.response_limit(config.evaluation.max_tokens, prompt_tokens)
    max_length = prompt_tokens + response_tokens
    shape.check_length(max_length, "data.max_prompt_tokens with evaluation.max_tokens")
    rollout = RolloutEngine(
        model_folder,
        config.rollout,
        processor,
        config.model.dtype,
        max_length,
        empty=True,
    )
    # Before the first step: vLLM's memory is for training until an evaluation is due.
    rollout.sleep(deep=True)
    return PeriodicEvaluation(
        config.evaluation,
        rollout,
        processor,
        config.rollout.tp,
        Path(config.run.dir),
        config.run.seed,
        keep=False,
    )


class StepTrainer:
    """Train step by step; record metrics, the loss of each source, and spikes of the loss.

    Attributes:
        spikes: watches the loss; its state is part of a checkpoint.
        log: writes the metrics, on the main rank only.
        peak_flops: FLOP per second of a device that the MFU refers to.
    """

    def __init__(
        self,
        config: ColdStartConfig,
        engine: Engine,
        world: World,
        checkpoint: ResumePoint | None,
    ):
        self.config = config
        self.engine = engine
        self.world = world
        self.spikes = SpikeWatch(config.run.spike_deviations, config.run.spike_window)
        first_step = 0
        if checkpoint:
            first_step = checkpoint.step
            self.spikes.load(checkpoint.state["spikes"])
        self.log = open_log(config, first_step, world)
        peak_flops = config.run.peak_tflops * 1e12
        self.peak_flops = peak_flops or matrix_rate(engine.config.params_dtype)

    def train(self, step: int, packs: SupervisedPacks, save_seconds: float) -> dict[str, float]:
        """Train step ``step`` on the next packs; return the engine's metrics.  A collective.

        Args:
            step: counted from 0.
            packs: stream of this rank's packs.
            save_seconds: seconds that saving held the previous step up, for the metrics.
        """
        began = time.perf_counter()
        step_packs = next(packs)
        data_seconds = time.perf_counter() - began
        losses = DocumentLosses(self.world.dp_rank)

        def objective(scores: Scores, pack: Pack) -> LossSum:
            loss = cross_entropy(scores, pack)
            if not self.world.groups.tp.rank():  # tensor-parallel ranks have the same log-probabilities
                logprobs = cast(Tensor, scores.logprobs)
                losses.add(pack, scores.rows, -logprobs)
            return loss

        metrics = self.engine.train(step_packs, objective)
        seconds = time.perf_counter() - began
        flops = 0.0
        # Once for each replica: its other ranks work on the same packs.
        if self.world.layout.leads_replica:
            flops = self._flops(step_packs)
        compute_seconds = self.engine.compute_timer.seconds
        rank_step = RankStep(
            data_seconds,
            compute_seconds,
            flops,
            *memory_peaks(),
            documents=losses.documents(),
        )
        # A collective: every rank takes part, and the main rank alone gets the result and logs it.
        rank_steps = gather(rank_step, self.world)
        if self.log and rank_steps is not None:
            replica_tokens = sum(len(pack.tokens) for pack in step_packs)
            tokens = replica_tokens * self.world.dp_size
            rank_documents = itertools.chain.from_iterable(rank.documents for rank in rank_steps)
            documents = merge_parts(rank_documents)
            self._record_spike(step, metrics, documents)
            if step % self.config.run.log_every == 0:
                values = self._step_metrics(metrics, documents, packs)
                values |= rank_metrics(rank_steps, seconds, tokens, self.peak_flops)
                values["timing/save"] = save_seconds
                self.log.scalars(step, values)
        return metrics

    def record_scores(self, step: int, scores: dict[str, float]) -> None:
        """Log the ``scores`` of the weights after ``step`` under that step."""
        if self.log:
            self.log.scalars(step, scores)

    def _step_metrics(
        self,
        metrics: dict[str, float],
        documents: list[DocumentLoss],
        packs: SupervisedPacks,
    ) -> dict[str, float]:
        """Return the logged metrics of loss, optimizer and data."""
        values = {"loss/train": metrics["loss"]}
        source_losses = by_source(documents)
        if len(source_losses) > 1:
            for source, loss in source_losses.items():
                values[f"loss/source/{source}"] = loss
        values |= {
            "optimizer/lr": metrics["lr"],
            "optimizer/grad_norm": metrics["grad_norm"],
            "optimizer/skipped": self.engine.skipped,
            "data/tokens": metrics["count"],
            "data/fill": packs.fill,
            "data/dropped": packs.dropped,
        }
        if isinstance(packs, EpochStream):
            values["data/epoch"] = packs.progress
        replies, learned_replies = packs.replies
        if replies:  # a tokenised set does not know them
            values |= {"data/replies": replies, "data/learned_replies": learned_replies}
        return values

    def _record_spike(
        self,
        step: int,
        metrics: dict[str, float],
        documents: list[DocumentLoss],
    ) -> None:
        """Record the documents of a step that was skipped or whose loss is an outlier."""
        deviations = self.spikes.judge(metrics["loss"])
        is_outlier = deviations is not None
        if self.log and (is_outlier or metrics["skipped"]):
            record = {
                "reason": "skipped" if metrics["skipped"] else "loss",
                "loss": metrics["loss"],
                "deviations": deviations,
                "grad_norm": metrics["grad_norm"],
                "documents": worst(documents, SPIKE_DOCUMENTS),
            }
            self.log.spikes.write(step, record)

    def _flops(self, packs: Sequence[Pack]) -> float:
        """Return the FLOP of forward and backward passes over ``packs``."""
        lengths: list[int] = []
        grids: list[list[int]] = []
        for pack in packs:
            lengths += pack.cu_seqlens.diff().tolist()
            grids += pack.grid_thw.tolist()
        model = self.config.model
        return training_flops(
            self.engine.shape,
            lengths,
            grids,
            model.trains_language,
            model.trains_vision,
            model.trains_merger,
            model.adapts_vision,
        )

    def close(self) -> None:
        """Close the files of the log."""
        if self.log:
            self.log.close()


def run(config: ColdStartConfig, launch: LaunchArgs | None = None) -> int:
    """Join the process group, train, and print the path of the result; return the exit code."""
    settings = config.run
    check_trackers(settings.trackers)
    with Watchdog(Path(settings.dir), settings.hang_timeout_s):
        world = distributed.start(
            config.parallel,
            settings.seed,
            settings.threads,
            settings.hang_timeout_s,
        )
        result = train(config, world, launch)
        if world.is_main:
            say(f"sft: {result.path}", sys.stdout)
        distributed.finish()
    return result.exit_code
