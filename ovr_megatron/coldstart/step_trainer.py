"""Train a supervised step and record it: loss, its sources and spikes, throughput, memory."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import cast

from torch import Tensor

from ovr_megatron.checkpoint.resume import ResumePoint
from ovr_megatron.config import ColdStartConfig
from ovr_megatron.data.document_losses import DocumentLoss, DocumentLosses, by_source, merge_parts, worst
from ovr_megatron.data.epochs import EpochStream
from ovr_megatron.data.packing import Pack
from ovr_megatron.data.supervised import StepPacks
from ovr_megatron.engine import Engine, LossSum
from ovr_megatron.model.flops import training_flops
from ovr_megatron.model.scores import Scores
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.logs import get_logger
from ovr_megatron.runtime.runlog import open_log
from ovr_megatron.runtime.spikes import SpikeWatch
from ovr_megatron.runtime.steps import RankStep, gather, matrix_rate, memory_peaks, rank_metrics

logger = get_logger(__name__)

SPIKE_DOCUMENTS = 16  # documents that the record of a spike names


def cross_entropy(scores: Scores, pack: Pack) -> LossSum:
    """Return the negative log-likelihood of the labelled tokens, summed: every token of a step weighs the same."""
    assert scores.logprobs is not None
    return LossSum(-scores.logprobs.sum(), len(scores.rows), {})


def format_totals(scores: dict[str, float]) -> str:
    """Return the scores of all rows of each set as text; deeper keys are of single sources, or details of a set."""
    return ", ".join(f"{key} {value:.4f}" for key, value in scores.items() if key.count("/") == 1)


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

    def train(self, step: int, packs: StepPacks, save_seconds: float) -> dict[str, float]:
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
        """Log the ``scores`` of the weights after ``step`` under that step, and print those of all rows of a set."""
        if self.log:
            self.log.scalars(step, scores)
            logger.info(f"after step {step + 1}: {format_totals(scores)}")

    def _step_metrics(
        self,
        metrics: dict[str, float],
        documents: list[DocumentLoss],
        packs: StepPacks,
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
        """Close the files of the log; a second call does nothing."""
        if self.log:
            self.log.close()
        self.log = None
