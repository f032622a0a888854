"""Have the ranks of `rollout.ranks` generate, as the ranks that train see them: commands, weights and responses.

The trainers' first rank gives commands, which `ovr_megatron.rl.serving` carries out on the generators.  Both sides meet
for every command and every reply.  With ``rollout.max_staleness=0`` the two take turns:

    update v0, generate 0, [learn 0], update v1, generate 1, [learn 1], update v2, ...

With 1 the responses of an iteration are generated while the one before it trains, by the weights before that:

    update v0, generate 0, generate 1 | learn 0, update v1, generate 2 | learn 1, update v2, ...

What the clock does decides nothing: the weights of a response are a function of its iteration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from ovr_megatron.checkpoint.resume import ResumePoint
from ovr_megatron.config import RLConfig
from ovr_megatron.ppo import archive
from ovr_megatron.ppo.archive import ArchiveError, SavedIteration
from ovr_megatron.ppo.batch import Response
from ovr_megatron.ppo.curriculum import max_tokens
from ovr_megatron.ppo.experience import Models
from ovr_megatron.ppo.iteration import Clock, IterationResult, learn
from ovr_megatron.ppo.prompts import PromptState, PromptStream
from ovr_megatron.ppo.rollouts import Rollout
from ovr_megatron.rollout.reshard import Reshard, Traffic
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.exchange import call_on_all, exchange
from ovr_megatron.runtime.logs import get_logger
from ovr_megatron.runtime.split_job import SplitJob
from ovr_megatron.runtime.stop import Stop, StopRequest, StopRequested

logger = get_logger(__name__)


@dataclass(frozen=True)
class Update:
    """Command: take new weights, those after ``version`` iterations."""

    version: int


@dataclass(frozen=True)
class Generate:
    """Command: generate and grade an iteration, and deliver its responses.

    Attributes:
        iteration: from 0, for the seeds.
        limit: most tokens of a prompt and its response together.
        stream: position of the prompt stream before the iteration.
    """

    iteration: int
    limit: int
    stream: PromptState


@dataclass(frozen=True)
class Evaluate:
    """Command: score the weights after ``done`` iterations, to the end unless ``may_stop``."""

    done: int
    may_stop: bool


@dataclass(frozen=True)
class End:
    """Command: end with an exit code."""

    code: int


Command = Update | Generate | Evaluate | End


@dataclass
class Delivery:
    """Reply to `Generate` without the responses themselves.

    Attributes:
        stream: position of the prompt stream after the iteration.
        drawn: prompts drawn.
        seconds: from the command to the last verdict.
        rest: see `Rollout`.
        stopped: the signal that ended generation; the other fields then say nothing.
    """

    stream: PromptState | None = None
    drawn: int = 0
    seconds: float = 0.0
    train_prompts: dict[int, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    long: bool = False
    postponed: list[int] = field(default_factory=list)
    stopped: Stop = Stop.NO


@dataclass(frozen=True)
class EvaluationReply:
    """Reply to `Evaluate`: the scores, and the signal that ended the evaluation."""

    metrics: dict[str, float]
    stopped: Stop = Stop.NO


@dataclass(frozen=True)
class ReceivedRollout:
    """Responses that have come and wait for their turn.

    Attributes:
        saved: has those of this rank.
        metrics: of their generation.
        stream: position of the prompt stream after their iteration; None where a checkpoint goes on with them.
    """

    saved: SavedIteration
    metrics: dict[str, float]
    stream: PromptState | None = None


def deliver(job: SplitJob, delivery: Delivery, responses: Sequence[Response], stop: StopRequest) -> None:
    """Send what this generator has to the trainers.  A collective of all ranks, the reply to `Generate`.

    Args:
        job: all ranks.
        delivery: that of the first generator counts.
        responses: those of this rank's engine, none on its followers.
        stop: requests to stop on this rank.
    """
    job.meet(stop)
    delivery = job.broadcast(delivery, job.trainers)
    if delivery.stopped:
        return
    # Equally over the trainers, which exchange them by the load of each once more.
    outgoing = {job.side_rank % job.trainers: list(responses)} if responses else {}
    exchange(outgoing, job.messages)


class Generators:
    """The ranks that only generate, as those that train see them.  Every method is a collective of the trainers.

    Attributes:
        received: the next iteration's responses, where they came while the last one trained.
    """

    def __init__(self, config: RLConfig, job: SplitJob, stop: StopRequest, last: int) -> None:
        """Plan no weights yet: the first `update` does.

        Args:
            config: of the job.
            job: all ranks.
            stop: requests to stop on this rank; one that came to a generator is entered here.
            last: iterations after which the run ends.
        """
        self.received: ReceivedRollout | None = None
        self._config = config
        self._job = job
        self._stop = stop
        self._last = last
        self._running: Generate | None = None
        rollout = config.rollout
        self._reshard = Reshard(None, int(rollout.bucket_mib * 2**20), rollout.check_updates, job.group)

    def start(self, models: Models, iteration: int, checkpoint: ResumePoint | None, run: Path) -> None:
        """Bring the weights of the beginning, and the responses that the checkpoint goes on with.

        Args:
            models: have the policy.
            iteration: the first one of this process.
            checkpoint: that the run goes on from, if it does.
            run: the run folder.
        """
        self.update(models, iteration)
        ahead = None
        if checkpoint and self._config.rollout.max_staleness:  # the run may have had another setting
            ahead = checkpoint.state.get("ahead")
        if ahead is None:
            return
        try:
            saved = call_on_all(lambda: archive.read(run, iteration, models.world))
        except ArchiveError as error:
            if models.world.is_main:
                logger.warning(f"{error}; the responses to go on with are generated anew, by newer weights")
            return
        self.received = ReceivedRollout(saved, ahead)

    def update(self, models: Models, version: int) -> Traffic:
        """Send the policy's weights, those after ``version`` iterations."""
        models.offload_except(models.policy)
        if models.config.offload:
            # The update reads the policy's weights alone, and its buckets need memory.
            models.policy.offload("gradients", "optimizer")
        self._send(Update(version))
        return self._reshard.update(models.policy.held())

    def collect(self, prompts: PromptStream, iteration: int) -> Rollout:
        """Return the responses of an iteration, and with ``rollout.max_staleness`` begin those of the next one.

        Raises:
            StopRequested: generation was stopped by a signal.
        """
        if self.received is None:
            self._generate(iteration, prompts.state())
            self.received = self._receive()
        received = self.received
        self.received = None
        rollout = archive.restore(received.saved, prompts)
        rollout.metrics |= received.metrics
        self._generate_ahead(iteration + 1, prompts.state())
        return rollout

    def go_on(self, iteration: int) -> None:
        """With ``rollout.max_staleness`` begin the iteration after ``iteration``, whose responses wait for their turn.

        `collect` would begin it as well, after what the trainers do between two iterations.
        """
        if self.received is not None and self.received.stream is not None:
            self._generate_ahead(iteration + 1, self.received.stream)

    def _generate_ahead(self, iteration: int, stream: PromptState) -> None:
        if self._config.rollout.max_staleness and self._running is None and iteration < self._last:
            self._generate(iteration, stream)

    def wait(self) -> None:
        """Wait for responses that are generated meanwhile, if any are; a stop request leaves them out."""
        if self._running is None:
            return
        try:
            self.received = self._receive()
        except StopRequested:
            self.received = None  # the iteration that has trained is complete: the run ends after it

    def archive_received(
        self, run: Path, iteration: int, prompts: PromptStream, world: World
    ) -> dict[str, float] | None:
        """Archive responses that wait for their turn, so that a run goes on with them from a checkpoint.

        They were drawn by weights that no checkpoint of this iteration has.  The stream stays where it is.

        Returns:
            The metrics of their generation, for the checkpoint; None where none wait or the disk does not take them.
        """
        if self.received is None:
            return None
        stream = prompts.state()
        dropped = prompts.dropped
        rollout = archive.restore(self.received.saved, prompts)
        prompts.load(stream)
        prompts.dropped = dropped
        responses = [r for r in rollout.responses if r.prompt in rollout.train_prompts]
        problem = archive.write(run, iteration, rollout, stream, responses, {}, world)
        return None if problem else self.received.metrics

    def scores(self, done: int, may_stop: bool) -> dict[str, float]:
        """Score the weights after ``done`` iterations, which the generators have.

        Raises:
            StopRequested: the evaluation was stopped by a signal.
        """
        self._send(Evaluate(done, may_stop))
        self._job.meet(self._stop)
        reply: EvaluationReply = self._job.broadcast(None, self._job.trainers)
        self._enter_stop(reply.stopped)
        return reply.metrics

    def end(self, code: int) -> None:
        """End the generators with an exit code."""
        self.wait()  # a signal has ended the run, and ends what is generated ahead
        self._send(End(code))

    def _generate(self, iteration: int, stream: PromptState) -> None:
        limit = max_tokens(self._config.curriculum, iteration)
        self._running = Generate(iteration, limit, stream)
        self._send(self._running)

    def _receive(self) -> ReceivedRollout:
        """Wait for the responses of the last `Generate`.

        Raises:
            StopRequested: generation was stopped by a signal.
        """
        command = self._running
        assert command is not None
        self._running = None
        self._job.meet(self._stop)
        delivery: Delivery = self._job.broadcast(None, self._job.trainers)
        self._enter_stop(delivery.stopped)
        responses: list[Response] = list(chain.from_iterable(exchange({}, self._job.messages)))
        saved = SavedIteration(
            command.limit,
            delivery.train_prompts,
            command.stream,
            delivery.drawn,
            responses,
            delivery.long,
            delivery.postponed,
        )
        metrics = delivery.metrics | {"timing/rollout": delivery.seconds}
        return ReceivedRollout(saved, metrics, delivery.stream)

    def _enter_stop(self, stopped: Stop) -> None:
        """Enter a signal that has ended the generators' work, and raise `StopRequested` if one has."""
        if stopped > Stop.NO:
            self._stop.received = max(self._stop.received, stopped)
            raise StopRequested

    def _send(self, command: Command) -> None:
        self._job.meet(self._stop)
        self._job.broadcast(command, 0)


def iterate_split(
    models: Models, generators: Generators, prompts: PromptStream, iteration: int, goes_on: bool
) -> IterationResult:
    """Run iteration ``iteration`` (from 0) with responses of the generators.  A collective of the trainers.

    ``timing/generate`` is what the trainers waited for responses.

    Args:
        models: those of the trainers.
        generators: the other ranks.
        prompts: the same on every trainer.
        iteration: from 0.
        goes_on: whether the generators may begin to generate ahead before the next call, as they have nothing to
            evaluate.

    Raises:
        StopRequested: a signal came while the trainers waited for the responses.
    """
    clock = Clock()
    with clock("generate"):
        rollout = generators.collect(prompts, iteration)
    result = learn(models, rollout, iteration, clock)
    with clock("generate"):
        generators.wait()
    with clock("sync"):
        traffic = generators.update(models, iteration + 1)
        if goes_on:
            generators.go_on(iteration + 1)
    metrics = result.metrics
    metrics |= traffic.metrics()
    # Again: those of `learn` do not have the seconds of these phases yet.
    metrics |= clock.metrics(result.experience.batch, models.world)
    metrics["perf/generate_tokens_per_second"] *= metrics["timing/generate"] / metrics["timing/rollout"]
    return result
