"""The loop of the cold start: supervised training on packed samples (paper, section 3.1)."""

from __future__ import annotations

import dataclasses
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
from ovr_megatron.checkpoint.store import ResumePoint
from ovr_megatron.config import ColdStartConfig
from ovr_megatron.data.document_losses import DocumentLoss, DocumentLosses, by_source, merged, worst
from ovr_megatron.data.packing import Pack
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.schema import RowError
from ovr_megatron.data.skipped import SkippedRows
from ovr_megatron.data.stream import open_stream
from ovr_megatron.data.supervised import SupervisedPacks, open_packs
from ovr_megatron.engine import Engine, LossSum
from ovr_megatron.model.flops import training_flops
from ovr_megatron.model.layers import cautions, layers_in_use
from ovr_megatron.model.qwen25vl import Scores
from ovr_megatron.model.shape import ModelShape
from ovr_megatron.plan.heading import run_rows, show_heading, source_rows
from ovr_megatron.runtime import distributed, run_folder
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.progress import Progress
from ovr_megatron.runtime.runlog import RunLog, record_layers
from ovr_megatron.runtime.spikes import SpikeWatch
from ovr_megatron.runtime.starts import LaunchArgs, record_start
from ovr_megatron.runtime.steps import RankStep, gather, matrix_rate, memory_peaks, rank_metrics
from ovr_megatron.runtime.stop import StopRequested
from ovr_megatron.runtime.terminal import say
from ovr_megatron.runtime.watchdog import Watchdog
from ovr_megatron.weights.folder import WeightFolder

if TYPE_CHECKING:
    from ovr_megatron.evaluation.periodic import PeriodicEvaluation

SPIKE_DOCUMENTS = 16  # that a record names
LENGTHS_MEASURED = 64  # rows whose mean length the epochs are told by


def cross_entropy(scores: Scores, pack: Pack) -> LossSum:
    """Negative log-likelihood of the labelled tokens, every token of the step weighing the same."""
    assert scores.logprobs is not None
    return LossSum(-scores.logprobs.sum(), len(scores.rows), {})


def train(config: ColdStartConfig, world: World, launch: LaunchArgs | None = None) -> RunResult:
    """Train to the last step, or until a signal comes, from the newest checkpoint if there is one."""
    run = Path(config.run.dir)
    checkpoints = CheckpointManager(config, world)
    source = store.weights_of(config.model.path)
    processor = Processor(source, config.data)
    packs, steps = open_packs(config, processor, world)
    config = dataclasses.replace(config, steps=steps)
    engine = Engine(ModelShape.from_hf(source), config.model, config.parallel, world)
    engine.with_optimizer(config.optimizer, config.steps)
    engines = {"policy": engine}
    checkpoint = checkpoints.resume(engines)
    if checkpoint:
        packs.load(checkpoint.state["packs"])
    else:
        store.check_weights(config.model.path, world)
        engine.load(WeightFolder(source))
    first = checkpoint.step if checkpoint else 0
    if world.is_main:
        run_folder.record(config, run)
        record_layers(run, layers_in_use(config.model), cautions(config.model, rollout=False))
        if launch:
            record_start(run, launch, world.size)
        write_hf_assets(run / "companions", processor)
        show_start(config, processor, engine, world, checkpoint)
    recorder = Recorder(config, engine, world, checkpoint)
    evaluation = build_evaluation(config, source, processor) if config.evaluation.every else None

    with Progress(config.steps, run.name, "step", world.is_main, first) as progress:
        if evaluation and evaluation.is_missing(first):
            evaluation.engine.update(engine.held())
            recorder.evaluated(first - 1, evaluation.scores(first))
        for step in range(first, config.steps):
            metrics = recorder.train(step, packs, checkpoints.save_seconds)
            progress.update(loss=f"{metrics['loss']:.4f}")
            done = step + 1
            if evaluation and evaluation.due(done, done == config.steps):
                evaluation.engine.update(engine.held())
                with suppress(StopRequested):  # the run leaves below, and its next start scores these weights
                    stop = None if done == config.steps else checkpoints.stop
                    recorder.evaluated(step, evaluation.scores(done, stop))
            state = {"packs": packs.state(), "spikes": recorder.spikes.state()}
            if checkpoints.end_step(done, done == config.steps, engines, state):
                break
    recorder.close()
    return checkpoints.result()


def show_start(
    config: ColdStartConfig, processor: Processor, engine: Engine, world: World, checkpoint: ResumePoint | None
) -> None:
    """Print what is about to be trained, on what, and from where."""
    tokens = config.packs_per_step * config.data.pack_tokens
    rows = [("batch", f"{config.packs_per_step} packs of {config.data.pack_tokens:,} = {tokens:,} tokens a step")]
    if config.data.tokenised:
        rows.append(("data", f"{config.data.tokenised}, {config.epochs} epochs unless steps are given"))
    else:
        rows += source_rows(config, config.steps * tokens / mean_length(config, processor))
    rows += run_rows(config, {"model": engine}, world, (checkpoint.path, checkpoint.step) if checkpoint else None)
    print(show_heading(f"cold start in {config.run.dir}", rows), flush=True)


def mean_length(config: ColdStartConfig, processor: Processor) -> float:
    """Return the mean tokens of the first samples; the length of a pack where none of them can be used."""
    lengths = []
    for row in islice(open_stream(config.data, config.run.seed, SkippedRows(None)), LENGTHS_MEASURED):
        try:
            lengths += [length for length in processor.lengths([row], False) if isinstance(length, int)]
        except RowError:
            continue  # the loop itself names the row and stops, or skips it
    return statistics.mean(lengths) if lengths else float(config.data.pack_tokens)


def build_evaluation(config: ColdStartConfig, source: Path, processor: Processor) -> PeriodicEvaluation:
    """VLLM on this rank, asleep between the evaluations."""
    # Here, so that a run without evaluation does not wait for vLLM.
    from ovr_megatron.evaluation.periodic import PeriodicEvaluation
    from ovr_megatron.rollout.engine import RolloutEngine

    prompt_tokens = config.data.max_prompt_tokens
    length = prompt_tokens + processor.shape.response_limit(config.evaluation.max_tokens, prompt_tokens)
    processor.shape.check_length(length, "data.max_prompt_tokens with evaluation.max_tokens")
    rollout = RolloutEngine(source, config.rollout, processor, config.model.dtype, length, empty=True)
    rollout.sleep(deep=True)
    run, seed = Path(config.run.dir), config.run.seed
    return PeriodicEvaluation(config.evaluation, rollout, processor, config.rollout.tp, run, seed, keep=False)


class Recorder:
    """Trains step by step and writes down what happened: metrics, the loss of each source, and spikes."""

    def __init__(self, config: ColdStartConfig, engine: Engine, world: World, checkpoint: ResumePoint | None):
        self.config, self.engine, self.world = config, engine, world
        self.spikes = SpikeWatch(config.run.spike_deviations, config.run.spike_window)
        if checkpoint:
            self.spikes.load(checkpoint.state["spikes"])
        first = checkpoint.step if checkpoint else 0
        self.log = RunLog(Path(config.run.dir), "train", first) if world.is_main else None
        self.peak_flops = config.run.peak_tflops * 1e12 or matrix_rate(engine.config.params_dtype)

    def train(self, step: int, packs: SupervisedPacks, save_seconds: float) -> dict[str, float]:
        """Step ``step`` on the next packs; returns what the engine says of it.  A collective."""
        began = time.perf_counter()
        step_packs = next(packs)
        data_seconds = time.perf_counter() - began
        losses = DocumentLosses(self.world.dp_rank)

        def objective(scores: Scores, pack: Pack) -> LossSum:
            loss = cross_entropy(scores, pack)
            if not self.world.groups.tp.rank():
                losses.add(pack, scores.rows, -cast(Tensor, scores.logprobs))
            return loss

        metrics = self.engine.train(step_packs, objective)
        seconds = time.perf_counter() - began
        flops = self._flops(step_packs) if self.world.layout.leads_replica else 0.0
        compute_seconds = self.engine.compute_timer.seconds
        rank_step = RankStep(data_seconds, compute_seconds, flops, *memory_peaks(), documents=losses.documents())
        rank_steps = gather(rank_step, self.world)
        if self.log and rank_steps is not None:
            tokens = sum(len(pack.tokens) for pack in step_packs) * self.world.dp_size
            documents = merged(document for rank in rank_steps for document in rank.documents)
            self._record_spike(step, metrics, documents)
            if step % self.config.run.log_every == 0:
                values = rank_metrics(rank_steps, seconds, tokens, self.peak_flops) | {"timing/save": save_seconds}
                self.log.scalars(step, self._losses(metrics, documents, packs) | values)
        return metrics

    def evaluated(self, step: int, scores: dict[str, float]) -> None:
        """Write the scores of the weights after ``step`` down with it."""
        if self.log:
            self.log.scalars(step, scores)

    def _losses(
        self, metrics: dict[str, float], documents: list[DocumentLoss], packs: SupervisedPacks
    ) -> dict[str, float]:
        sources = by_source(documents)
        every, learned = packs.replies
        replies = {"data/replies": every, "data/learned_replies": learned} if every else {}  # not known of a set
        return {
            "loss/train": metrics["loss"],
            **({f"loss/source/{name}": loss for name, loss in sources.items()} if len(sources) > 1 else {}),
            "optimizer/lr": metrics["lr"],
            "optimizer/grad_norm": metrics["grad_norm"],
            "optimizer/skipped": self.engine.skipped,
            "data/tokens": metrics["count"],
            "data/fill": packs.fill,
            "data/dropped": packs.dropped,
            **replies,
        }

    def _record_spike(self, step: int, metrics: dict[str, float], documents: list[DocumentLoss]) -> None:
        """Name the documents of a step whose loss stands out or that was skipped."""
        score = self.spikes.judge(metrics["loss"])
        if self.log and (score is not None or metrics["skipped"]):
            record = {
                "reason": "skipped" if metrics["skipped"] else "loss",
                "loss": metrics["loss"],
                "deviations": score,
                "grad_norm": metrics["grad_norm"],
                "documents": worst(documents, SPIKE_DOCUMENTS),
            }
            self.log.spikes.write(step, record)

    def _flops(self, packs: Sequence[Pack]) -> float:
        lengths = [length for pack in packs for length in pack.cu_seqlens.diff().tolist()]
        grids = [grid for pack in packs for grid in pack.grid_thw.tolist()]
        model = self.config.model
        return training_flops(self.engine.shape, lengths, grids, not model.freeze_language, not model.freeze_vision)

    def close(self) -> None:
        """Close the files."""
        if self.log:
            self.log.close()


def run(config: ColdStartConfig, launch: LaunchArgs | None = None) -> int:
    """Join the process group, train, and say where the result lies; return the exit code."""
    settings = config.run
    with Watchdog(Path(settings.dir), settings.hang_timeout_s):
        world = distributed.start(config.parallel, settings.seed, settings.threads, settings.hang_timeout_s)
        result = train(config, world, launch)
        if world.is_main:
            say(f"cold start: {result.path}", sys.stdout)
        distributed.finish()
    return result.exit_code
