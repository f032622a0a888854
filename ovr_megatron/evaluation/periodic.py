"""Evaluate the live weights on problem sets every few steps of training (paper, figure 4)."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from ovr_megatron.config import EvaluationConfig, EvaluationSettings
from ovr_megatron.data.processing import Processor
from ovr_megatron.evaluation.evaluator import EvalContext, evaluate
from ovr_megatron.evaluation.problems import open_problems
from ovr_megatron.evaluation.scoring import EvaluationResult
from ovr_megatron.rewards.pool import GraderPool
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.runtime.stop import StopRequest


class EvaluationSchedule:
    """The problem sets of ``config.sources``, and the steps at which they are due."""

    def __init__(self, config: EvaluationConfig, processor: Processor, run: Path, seed: int):
        """Open the problem sets.

        Args:
            config: The problem sets, and every how many steps they are due.
            processor: The trainer's processor.
            run: The run folder.
            seed: Seed of the samples.

        Raises:
            ConfigError: a set is endless and ``evaluation.limit`` is 0.
            RowError: a set cannot be opened.
        """
        self.config = config
        self.processor = processor
        self.run = run
        max_tokens = processor.shape.response_limit(config.max_tokens, processor.config.max_prompt_tokens)
        self.settings = EvaluationSettings(**vars(config) | {"max_tokens": max_tokens, "seed": seed})
        self.sets = [open_problems(source, config.limit) for source in config.sources]
        for problems in self.sets:
            problems.check_references(problems.resolve_settings(self.settings).metric)

    def due(self, done: int, last: bool) -> bool:
        """Return whether the weights after ``done`` steps are to be scored."""
        return done % self.config.every == 0 or last

    def is_missing(self, done: int) -> bool:
        """Return whether the weights after ``done`` steps were due, but the run ended before they were scored.

        A collective.
        """
        folder = self._folder(done)
        # The first rank looks for all: the others may not see its files yet, and all must take the same path.
        box = [not all((folder / f"{problems.name}.json").exists() for problems in self.sets)]
        dist.broadcast_object_list(box, src=0)
        return done > 0 and self.due(done, last=False) and box[0]

    def _folder(self, done: int) -> Path:
        return self.run / "evaluation" / f"step_{done:06d}"


class PeriodicEvaluation(EvaluationSchedule):
    """Evaluates every set of ``config.sources`` at the steps that are due.

    Scores and responses are written to ``RUN/evaluation/step_NNNNNN/``, in the format of `evaluate`.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        engine: RolloutEngine,
        processor: Processor,
        tp: int,
        run: Path,
        seed: int,
        keep: bool = True,
    ):
        """Open the problem sets.

        Args:
            config: The problem sets, and every how many steps they are due.
            engine: vLLM on this rank; it must have the live weights whenever `scores` is called.
            processor: The trainer's processor.
            tp: Ranks that hold one engine.
            run: The run folder.
            seed: Seed of the samples.
            keep: Whether the engine's weights are used again before the next update.

        Raises:
            ConfigError: a set is endless and ``evaluation.limit`` is 0.
            RowError: a set cannot be opened.
        """
        super().__init__(config, processor, run, seed)
        self.engine = engine
        self.tp = tp
        self.keep = keep

    def scores(self, done: int, stop: StopRequest | None = None) -> dict[str, float]:
        """Score the weights after ``done`` steps; a collective.

        Args:
            done: Steps done.
            stop: End early when a signal comes.

        Returns:
            ``evaluation/NAME``, the greedy accuracy, ``.../cut_off``, the share of responses that reached the limit
            of their length, ``.../failed``, the greedy responses on which no grader came to a verdict, and with samples
            ``evaluation/NAME/pass@k``; empty on all ranks but the first.

        Raises:
            StopRequested: on all ranks, as one was asked to stop.
        """
        metrics: dict[str, float] = {}
        try:
            with GraderPool(self.config.workers) as grader:
                model = f"{self.run} after {done} steps"
                context = EvalContext(model, self.engine, self.processor, grader, self.tp, stop)
                for problems in self.sets:
                    settings = problems.resolve_settings(self.settings)
                    if result := evaluate(context, problems, settings, self._folder(done)):
                        metrics |= _metrics(f"evaluation/{problems.name}", result)
        finally:
            # The engine drops its caches: a run that resumes at this step starts with empty ones as well, and must
            # generate the same. A checkpoint may need the memory of weights that are not used again.
            self.engine.sleep(deep=not self.keep)
        return metrics


def _metrics(prefix: str, result: EvaluationResult) -> dict[str, float]:
    greedy = result["greedy"]
    metrics = {prefix: greedy["accuracy"]}
    if greedy["stopped"] is not None:  # None: every prompt was too long
        metrics[f"{prefix}/cut_off"] = 1 - greedy["stopped"]
    metrics[f"{prefix}/failed"] = float(greedy["failed"])
    if result["sampled"]:
        for k, share in result["sampled"]["pass"].items():
            metrics[f"{prefix}/pass@{k}"] = share["accuracy"]
    return metrics
