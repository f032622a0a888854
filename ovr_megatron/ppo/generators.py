"""Have the ranks of `rollout.ranks` generate, as the ranks that train see them: commands, weights and responses.

The trainers' first rank gives commands, which `ovr_megatron.rl.serving` carries out on the generators.  Both sides meet
for every command and every reply, but for the parts of an iteration (`ovr_megatron.ppo.parts`).  With
``rollout.max_staleness=0`` the two take turns:

    update v0, generate 0, [learn 0], update v1, generate 1, [learn 1], update v2, ...

With K the responses of an iteration are generated while the K-th before it trains, by the weights before that one; so
with 1:

    update v0, generate 0, generate 1 | learn 0, update v1, generate 2 | learn 1, update v2, ...

With ``rollout.oversample``, too, generation is one iteration ahead.  A round then ends at a step of the engines that
token counts decide (`RoundCut`), its unfinished responses go on in the next round by the weights of then, and the
trainers keep a copy of them for checkpoints.

What the clock does decides nothing: the weights of a token are a function of the round that draws it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from ovr_megatron.checkpoint import store
from ovr_megatron.checkpoint.resume import ResumePoint
from ovr_megatron.config import RLConfig
from ovr_megatron.ppo import archive
from ovr_megatron.ppo.archive import ArchiveError, SavedIteration
from ovr_megatron.ppo.batch import Response
from ovr_megatron.ppo.curriculum import max_tokens
from ovr_megatron.ppo.experience import Models
from ovr_megatron.ppo.generator_commands import (
    Command,
    Continue,
    Delivery,
    End,
    Evaluate,
    EvaluationReply,
    Generate,
    Update,
    receive_groups,
)
from ovr_megatron.ppo.parts import EnginePart, engine_peers
from ovr_megatron.ppo.prompts import PromptState, PromptStream
from ovr_megatron.ppo.rollouts import Rollout
from ovr_megatron.ppo.unfinished import UnfinishedGroup, UnfinishedResponses
from ovr_megatron.rollout.reshard import Reshard, Traffic
from ovr_megatron.runtime.distributed import World, patient_group
from ovr_megatron.runtime.exchange import call_on_all, exchange, gather_objects
from ovr_megatron.runtime.logs import get_logger
from ovr_megatron.runtime.split_job import SplitJob
from ovr_megatron.runtime.stop import Stop, StopRequest, StopRequested

logger = get_logger(__name__)


@dataclass(frozen=True)
class ReceivedRollout:
    """Responses that have come and wait for their turn.

    Attributes:
        iteration: that trains on them.
        saved: has those of this rank, but for responses that came in parts.
        metrics: of their generation.
        stream: position of the prompt stream after their iteration.
        groups: responses that their round left unfinished, by index in the queue; this rank's part of a copy.
    """

    iteration: int
    saved: SavedIteration
    metrics: dict[str, float]
    stream: PromptState
    groups: dict[int, UnfinishedGroup]


class Generators:
    """The ranks that only generate, as those that train see them.  Every method is a collective of the trainers.

    Attributes:
        received: the responses of the next iterations that have come, in order.
        unfinished: this rank's part of a copy of what the generators' queue of unfinished responses was after the last
            iteration in `archive_received` or, later than that, in `collect`: what a checkpoint is complete with.
    """

    def __init__(self, config: RLConfig, job: SplitJob, stop: StopRequest, last: int) -> None:
        """Plan no weights yet: the first `update` does.

        Args:
            config: of the job.
            job: all ranks.
            stop: requests to stop on this rank; one that came to a generator is entered here.
            last: iterations after which the run ends.
        """
        self.received: deque[ReceivedRollout] = deque()
        self.unfinished = UnfinishedResponses()
        self._config = config
        self._job = job
        self._stop = stop
        self._last = last
        self._running: Generate | None = None
        self._sending: set[int] = set()  # engines whose parts this trainer takes, without those that are done
        rollout = config.rollout
        self._reshard = Reshard(None, int(rollout.bucket_mib * 2**20), rollout.check_updates, job.group)

    def start(
        self,
        models: Models,
        iteration: int,
        checkpoint: ResumePoint | None,
        run: Path,
        prompts: PromptStream,
    ) -> None:
        """Bring the weights of the beginning, and the responses that the checkpoint goes on with.

        Args:
            models: have the policy.
            iteration: the first one of this process.
            checkpoint: that the run goes on from, if it does.
            run: the run folder.
            prompts: at the position of the checkpoint, where they stay.
        """
        self.update(models, iteration)
        if checkpoint is None:
            return
        ahead = ahead_of(checkpoint)
        # The run may have had other settings: then what was generated ahead is generated anew.
        complete = not ahead
        if ahead and self._config.rollout.rounds_ahead:
            complete = self._read_ahead(ahead, iteration, models.world, run, prompts)
        if not (complete and self._config.rollout.continues_responses):
            return  # all prompts that wait begin again
        self.unfinished.load(store.read_loop_arrays(checkpoint, models.world))
        if self.received:
            self.received[-1].groups.update(self.unfinished.groups)
        self._send(Continue())
        generator = self._job.trainers + self._job.side_rank % self._job.generators
        groups = self.unfinished.groups
        exchange({generator: groups} if groups else {}, self._job.messages)

    def _read_ahead(
        self,
        ahead: Sequence[dict[str, float]],
        iteration: int,
        world: World,
        run: Path,
        prompts: PromptStream,
    ) -> bool:
        """Read the responses that were generated ahead of ``iteration``; return whether all are there."""
        position = prompts.state()
        dropped = prompts.dropped
        try:
            for following, metrics in enumerate(ahead, iteration):
                saved = call_on_all(partial(archive.read, run, following, world))
                archive.restore(saved, prompts)
                self.received.append(ReceivedRollout(following, saved, metrics, prompts.state(), {}))
        except ArchiveError as error:
            if world.is_main:
                logger.warning(f"{error}; the responses to go on with are generated anew, by newer weights")
            return False
        finally:
            prompts.load(position)
            prompts.dropped = dropped
        return True

    def update(self, models: Models, version: int) -> Traffic:
        """Send the policy's weights, those after ``version`` iterations."""
        models.offload_except(models.policy)
        if models.config.offload:
            # The update reads the policy's weights alone, and its buckets need memory.
            models.policy.offload("gradients", "optimizer")
        self._send(Update(version))
        return self._reshard.update(models.policy.held())

    def collect(self, prompts: PromptStream, iteration: int) -> Rollout:
        """Return the responses of an iteration, and with ``rollout.max_staleness`` begin those of a later one.

        Raises:
            StopRequested: generation was stopped by a signal.
        """
        if not self.received:
            self._generate(iteration, prompts.state())
            self._receive()
        received = self.received.popleft()
        rollout = archive.restore(received.saved, prompts)
        rollout.metrics |= received.metrics
        self.unfinished.groups = received.groups
        self._generate_ahead(iteration, prompts.state())
        return rollout

    def begin(self, iteration: int, stream: PromptState) -> None:
        """Begin an iteration whose responses come in parts: `receive_part` up to the last one, then `finish`.

        ``stream`` is the position of the prompt stream before the iteration.
        """
        peers = engine_peers(self._config, self._job)
        self._sending = {engine for engine, trainer in peers.items() if trainer == self._job.rank}
        self._generate(iteration, stream)

    def receive_part(self) -> EnginePart:
        """Return this trainer's responses of the next part; ``is_last`` and ``is_cancelled`` agree on all trainers.

        Parts must be received up to the last one, also those after a cancelled one.
        """
        responses: list[Response] = []
        tokens: dict[int, int] = {}
        is_cancelled = False
        for engine in sorted(self._sending):
            engine_part: EnginePart = self._job.receive(engine, self._stop)
            responses += engine_part.responses
            tokens |= engine_part.tokens
            is_cancelled |= engine_part.is_cancelled
            if engine_part.is_last:
                self._sending.remove(engine)
        # A request to stop that came here: the engines end as soon as they see it, and what they have sent is dropped.
        is_cancelled |= self._stop.received > Stop.NO
        # Not in the gather below: it has a time-out, and an engine of another trainer may take longer.
        self._job.barrier(self._stop, patient_group())
        ends = gather_objects((not self._sending, is_cancelled))
        is_last = all(end for end, _ in ends)
        is_cancelled = any(cancelled for _, cancelled in ends)
        return EnginePart(responses, tokens, is_last, is_cancelled)

    def finish(self) -> ReceivedRollout:
        """Return metrics, stream position and trained prompts of the iteration, whose responses came in parts.

        Raises:
            StopRequested: generation was stopped by a signal.
        """
        self._receive()
        return self.received.popleft()

    def go_on(self) -> None:
        """With ``rollout.max_staleness`` begin a further iteration.

        `collect` would begin it as well, after what the trainers do between two iterations.
        """
        if self.received:
            self._generate_ahead(self.received[0].iteration, self.received[-1].stream)

    def _generate_ahead(self, iteration: int, stream: PromptState) -> None:
        """Begin a further iteration if the generators do nothing and are not far enough ahead of ``iteration``.

        ``stream`` is the position after ``iteration`` where no later one has come.
        """
        further = iteration + 1
        if self.received:
            further = self.received[-1].iteration + 1
            stream = self.received[-1].stream
        last = min(iteration + self._config.rollout.rounds_ahead, self._last - 1)
        if self._running is None and further <= last:
            self._generate(further, stream)

    def wait(self, iteration: int) -> None:
        """Wait until generation is as far ahead of ``iteration`` as it may be; a stop request leaves all of it out."""
        try:
            while self._running is not None:
                self._receive()
                # At the begin of a run: later, one iteration is generated for each that trains.
                self._generate_ahead(iteration, self.received[-1].stream)
        except StopRequested:
            self.received.clear()  # the iteration that has trained is complete: the run ends after it

    def archive_received(self, run: Path, prompts: PromptStream, world: World) -> list[dict[str, float]] | None:
        """Archive responses that wait for their turn, so that a run goes on with them from a checkpoint.

        They were drawn by weights that no checkpoint of this iteration has.  The stream stays where it is.

        Returns:
            The metrics of their generation, for the checkpoint; None where none wait or the disk does not take them.
        """
        position = prompts.state()
        dropped = prompts.dropped
        problem = None
        for received in self.received:
            stream = prompts.state()
            rollout = archive.restore(received.saved, prompts)
            responses = [r for r in rollout.responses if r.prompt in rollout.train_prompts]
            problem = archive.write(run, received.iteration, rollout, stream, responses, {}, world)
            if problem:
                break
        prompts.load(position)
        prompts.dropped = dropped
        if problem or not self.received:
            return None
        self.unfinished.groups = self.received[-1].groups
        return [received.metrics for received in self.received]

    def scores(self, done: int, may_stop: bool) -> dict[str, float]:
        """Score the weights after ``done`` iterations, which the generators have.

        Raises:
            StopRequested: the evaluation was stopped by a signal.
        """
        self._send(Evaluate(done, may_stop))
        self._job.barrier(self._stop)
        reply: EvaluationReply = self._job.broadcast(None, self._job.trainers)
        self._enter_stop(reply.stopped)
        return reply.metrics

    def end(self, code: int) -> None:
        """End the generators with an exit code."""
        if self._running is not None:
            with suppress(StopRequested):  # a signal has ended the run, and ends what is generated ahead
                self._receive()
        self._send(End(code))

    def _generate(self, iteration: int, stream: PromptState) -> None:
        limit = max_tokens(self._config.curriculum, iteration)
        self._running = Generate(iteration, limit, stream)
        self._send(self._running)

    def _receive(self) -> None:
        """Wait for the responses of the last `Generate`, and put them behind those that have come.

        Raises:
            StopRequested: generation was stopped by a signal.
        """
        command = self._running
        assert command is not None
        self._running = None
        self._job.barrier(self._stop)
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
            delivery.restarted,
            delivery.unfinished,
            mixed=delivery.mixed,
        )
        groups = {} if delivery.restarted is None else receive_groups(self._job)
        metrics = delivery.metrics | {"timing/rollout": delivery.seconds}
        assert delivery.stream is not None, "only generation that was stopped has none"
        self.received.append(ReceivedRollout(command.iteration, saved, metrics, delivery.stream, groups))

    def _enter_stop(self, stopped: Stop) -> None:
        """Enter a signal that has ended the generators' work, and raise `StopRequested` if one has."""
        if stopped > Stop.NO:
            self._stop.received = max(self._stop.received, stopped)
            raise StopRequested

    def _send(self, command: Command) -> None:
        self._job.barrier(self._stop)
        self._job.broadcast(command, 0)


def ahead_of(checkpoint: ResumePoint) -> list[dict[str, float]]:
    """Return the metrics of the iterations that were generated ahead of a checkpoint, none where there are none."""
    return checkpoint.state.get("ahead") or []
