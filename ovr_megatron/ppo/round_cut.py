"""End an oversampled round at a step that depends on token counts alone (RollPacker, arXiv 2509.21009, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ovr_megatron.rollout.pending import SampleKey
from ovr_megatron.runtime.distributed import default_store
from ovr_megatron.runtime.exchange import gather_objects
from ovr_megatron.runtime.work_barrier import WorkBarrier

INTERVAL = 16  # engine steps between two comparisons: each costs a message to the store and a broadcast in the engine
# A count of an interval is one number in the store, so that one addition publishes all of it:
# answered prompts, then the replicas that published, then those of them that have no prompt left.
_REPLICA = 1 << 24
_ENDED = 1 << 40


class RoundCut:
    """The step after which a round has enough answered prompts over all replicas.

    After every `INTERVAL` engine steps a replica publishes how many of its prompts are answered.  The round ends at
    the first interval for which all replicas have published and whose sum is enough.  By then every replica has made
    the steps in which the first of enough prompts were answered, and those it makes before it hears of the end answer
    none earlier: with the same prompts on each replica the clock decides nothing.  Where unfinished responses are kept,
    they are cut to the tokens that they had at that step, which ``token_counts`` tells at the end of each interval.

    Attributes:
        last_step: The step with which the round ends; None while it is not known on this rank.
    """

    def __init__(
        self,
        name: str,
        prompts: int,
        replica: int,
        replicas: int,
        token_counts: Callable[[], Mapping[SampleKey, int]] | None = None,
    ) -> None:
        """Begin a round.

        Args:
            name: Of the round, unique in the process group.
            prompts: Answered prompts that are enough.
            replica: Number of this rank's engine.
            replicas: Number of engines.
            token_counts: Returns the tokens of the engine's unfinished responses, on a rank that keeps them.
        """
        self.last_step: int | None = None
        self._token_counts = token_counts
        self._counts_by_step: dict[int, Mapping[SampleKey, int]] = {}  # of the intervals that may be the last
        self._store = default_store(f"cut/{name}")
        self._needed = prompts
        self._replica = replica
        self._replicas = replicas
        self._steps = 0
        self._answer_steps: dict[int, int] = {}
        self._published = 0  # intervals
        self._compared = 0

    def answer(self, prompt: int) -> None:
        """Record that ``prompt`` has all of its responses in the step under way."""
        self._answer_steps[prompt] = self._steps + 1

    def engine_step(self, agree: Callable[[Callable[[], int]], int]) -> bool:
        """Count a step of the engine; return whether the round has ended.

        ``agree`` (`RolloutEngine.agree`) gives the engine's ranks, which make their steps together, the same answer.
        """
        self._steps += 1
        if self._steps % INTERVAL:
            return False
        if self._token_counts:
            self._counts_by_step[self._steps] = self._token_counts()
        return bool(agree(self._compare_step))

    def unfinished_counts(self) -> Mapping[SampleKey, int]:
        """Return the tokens at the last step of each response of this engine that was not finished then.

        To be called after `postponed`.  Without an entry are those that were finished, which are all where the engine
        had ended its work before.
        """
        if self.last_step is None:
            return {}
        return self._counts_by_step.get(self.last_step, {})

    def wait(self, barrier: WorkBarrier, meanwhile: Callable[[], None], leads: bool) -> None:
        """Wait for all engines to end their work, and publish meanwhile for this one, which has.  A collective.

        Args:
            barrier: That of the round.
            meanwhile: Called while this rank waits, if it speaks for its engine.
            leads: Whether it does.

        Raises:
            StopRequested: on all ranks, as one was asked to stop.
        """

        def publish() -> None:
            if self.last_step is None:
                if self._published == self._compared:
                    self._publish(ended=True)
                self._compare()
            meanwhile()

        barrier.wait(publish if leads else None)

    def postponed(self, indices: Sequence[int], failed: Sequence[int], leads: bool) -> list[int]:
        """Return those of the prompts ``indices`` that the round leaves to a later one; forget it.  A collective.

        Of more than enough answered prompts those that were answered in the earliest step are taken, and of one step
        those with the smallest index.

        Args:
            indices: All prompts of the round.
            failed: Those that this rank's engine gave up, which are drawn no more.
            leads: Whether this rank speaks for its engine.
        """
        answered = self._answer_steps if leads else {}  # the ranks of an engine answer the same prompts
        ranks = gather_objects((answered, failed if leads else [], self._published))
        step_of_prompt: dict[int, int] = {}
        given_up: set[int] = set()
        most_published = 0
        for rank_answered, rank_failed, published in ranks:
            step_of_prompt |= rank_answered
            given_up.update(rank_failed)
            most_published = max(most_published, published)
        order = sorted(step_of_prompt, key=lambda prompt: (step_of_prompt[prompt], prompt))
        if len(order) >= self._needed:
            # A rank whose engine ended its work first may not have heard of the last step, or no rank has: they are
            # let out of the barrier as soon as all are in it.  It is the end of the first interval with enough.
            self.last_step = -(-step_of_prompt[order[self._needed - 1]] // INTERVAL) * INTERVAL
        if leads and self._replica == 0:
            # All ranks are done with them, and a long run would fill the memory of the rank that holds the store.
            for interval in range(1, most_published + 1):
                self._store.delete_key(str(interval))
        decided = given_up | set(order[: self._needed])
        return [prompt for prompt in indices if prompt not in decided]

    def _compare_step(self) -> int:
        """Publish the interval that ends now; return whether the round has ended."""
        self._publish(ended=False)
        self._compare()
        return int(self.last_step is not None)

    def _publish(self, ended: bool) -> None:
        self._published += 1
        last_step = self._published * INTERVAL
        answered = sum(step <= last_step for step in self._answer_steps.values())
        self._store.add(str(self._published), answered + _REPLICA + ended * _ENDED)

    def _compare(self) -> None:
        """Compare, in order, the intervals for which all replicas have published."""
        while self.last_step is None and self._compared < self._published:
            count = self._store.add(str(self._compared + 1), 0)  # adding 0 reads
            ended, rest = divmod(count, _ENDED)
            replicas, answered = divmod(rest, _REPLICA)
            if replicas < self._replicas:
                return
            self._compared += 1
            self._counts_by_step.pop((self._compared - 1) * INTERVAL, None)
            # Without a prompt left on any replica there may be fewer than enough, as some were given up.
            if answered >= self._needed or ended == self._replicas:
                self.last_step = self._compared * INTERVAL
