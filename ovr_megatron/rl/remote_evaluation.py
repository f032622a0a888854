"""Evaluate the live weights on the ranks that only generate."""

from __future__ import annotations

from pathlib import Path

from ovr_megatron.config import RLConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.evaluation.periodic import EvaluationSchedule
from ovr_megatron.ppo.generators import Generators
from ovr_megatron.runtime.stop import StopRequest


class RemoteEvaluation(EvaluationSchedule):
    """Says when the weights are to be scored, and has the generators score them, which write the files."""

    def __init__(self, config: RLConfig, generators: Generators, processor: Processor, run: Path):
        """Open the problem sets, to refuse those that cannot be used before anything trains.

        Args:
            config: of the job.
            generators: they must have the live weights whenever `scores` is called.
            processor: The trainer's processor.
            run: The run folder.

        Raises:
            ConfigError: a set is endless and ``evaluation.limit`` is 0.
            RowError: a set cannot be opened.
        """
        super().__init__(config.evaluation, processor, run, config.run.seed)
        self._generators = generators

    def scores(self, done: int, stop: StopRequest | None = None) -> dict[str, float]:
        """Score the weights after ``done`` steps as `PeriodicEvaluation.scores`; the metrics are on all trainers."""
        return self._generators.scores(done, may_stop=stop is not None)
