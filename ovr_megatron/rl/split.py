"""Train beside ranks that only generate: begin and end with them, and have them evaluate."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from ovr_megatron.config import ConfigError, RLConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.evaluation.periodic import EvaluationSchedule
from ovr_megatron.ppo.generators import Generators
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.split_job import SplitJob
from ovr_megatron.runtime.stop import StopRequest


def check_sides(config: RLConfig, world: World | None) -> None:
    """Refuse ``rollout.ranks`` where the ranks have not joined as two sides.

    Raises:
        ConfigError: a program asks for it.
    """
    if config.rollout.ranks and (world is None or world.job is None):
        raise ConfigError(
            f"rollout.ranks={config.rollout.ranks} is for `ovr rl`: in a program all ranks train and generate; "
            "leave it at 0"
        )


def join_generators(
    config: RLConfig,
    job: SplitJob,
    stop: StopRequest,
    last: int,
    exit_code: Callable[[], int],
    resources: ExitStack,
) -> Generators:
    """Return the ranks that only generate, which end with ``resources`` as the run does.

    Args:
        config: of the job.
        job: all ranks.
        stop: requests to stop on this rank.
        last: iterations after which the run ends.
        exit_code: returns that of the run, at its end.
        resources: of the run.
    """
    generators = Generators(config, job, stop, last)

    def end(kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:  # with an error the generators end by themselves
            generators.end(exit_code())

    resources.push(end)
    return generators


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
