"""Divide the prompts of a round among the engines: by index, or from one queue."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from ovr_megatron.ppo.unfinished import UnfinishedGroup
from ovr_megatron.runtime.distributed import default_store


@dataclass
class RoundWork:
    """What an engine does in a round, the same on all of its ranks.

    Attributes:
        prompts: indices of those that it takes at the begin.
        shared: indices of those that the engines take from one queue.
        complete: indices of those to which earlier rounds have finished all responses.
        groups: what earlier rounds left of ``prompts`` and ``complete``, by index.
    """

    prompts: list[int]
    shared: list[int] = field(default_factory=list)
    complete: list[int] = field(default_factory=list)
    groups: dict[int, UnfinishedGroup] = field(default_factory=dict)


def assign(indices: Sequence[int], replica: int, replicas: int, static: bool) -> RoundWork:
    """Return the share of engine ``replica`` of prompts of which none has begun.

    ``static``: replica r of R answers every R-th prompt from the r-th.  Otherwise all are in one queue.
    """
    if static:
        return RoundWork(list(indices[replica::replicas]))
    return RoundWork([], list(indices))


def assign_continued(
    continued: int,
    complete: Collection[int],
    total: int,
    replicas: int,
    static: bool,
) -> tuple[list[RoundWork], dict[int, int]]:
    """Return each replica's share of a round that goes on with responses, and the replica of each such prompt.

    By index alone, so that no clock decides which engine goes on with a response.

    Args:
        continued: the first so many prompts have responses, or parts of them.
        complete: indices of those of them whose responses are all finished.
        total: prompts of the round.
        replicas: number of engines.
        static: whether prompts that begin are assigned by index, too; otherwise they are in one queue.
    """
    ongoing = [index for index in range(continued) if index not in complete]
    beginning = list(range(continued, total))
    # Those that go on come first, as they are likely to be the longest.
    assigned = ongoing + beginning if static else ongoing
    shared = [] if static else beginning
    finished = sorted(complete)
    shares = []
    replica_of_prompt: dict[int, int] = {}
    for replica in range(replicas):
        work = RoundWork(assigned[replica::replicas], shared, finished[replica::replicas])
        shares.append(work)
        for index in (*work.prompts, *work.complete):
            if index < continued:
                replica_of_prompt[index] = replica
    return shares, replica_of_prompt


class PromptQueue:
    """Gives an engine its prompts of a round: all of its own at once, and the next of the queue when it has room.

    An engine with short responses so takes more prompts than others.  Until every engine has asked, each takes its
    equal share of the queue at most, or those that ask first would take all prompts and leave others without any.
    """

    def __init__(
        self,
        work: RoundWork,
        name: str,
        responses: int,
        max_num_seqs: int,
        replicas: int,
        agree: Callable[[Callable[[], int]], int],
    ) -> None:
        """Open the queue for one engine.

        Args:
            work: of the engine.
            name: of the queue, unique in the process group.
            responses: to each prompt.
            max_num_seqs: responses that the engine generates at the same time.
            replicas: number of engines.
            agree: `RolloutEngine.agree`.
        """
        self._own = list(work.prompts)
        self._shared = work.shared
        self._responses = responses
        self._max_num_seqs = max_num_seqs
        self._replicas = replicas
        self._agree = agree
        self._share = -(-len(work.shared) // replicas)
        self._taken = 0  # from the queue
        # Both remembered, as asking costs a message to the store and a broadcast before each decoding step.
        self._is_empty = not work.shared
        self._all_have_asked = False
        self._has_asked = False
        if work.shared:
            self._store = default_store(f"queue/{name}")

    def take(self, unfinished: int) -> list[int]:
        """Return the next prompts of the engine, which still works on so many responses."""
        prompts, self._own = self._own, []
        unfinished += len(prompts) * self._responses
        while not self._is_empty and unfinished < self._max_num_seqs and self._may_take(unfinished):
            # Asked by the leader alone: the ranks of an engine must take the same prompts.  The store adds for one
            # rank at a time, so that no position is given to two engines.
            position = self._agree(lambda: self._store.add("next", 1) - 1)
            self._is_empty = position >= len(self._shared)
            if not self._is_empty:
                prompts.append(self._shared[position])
                self._taken += 1
                unfinished += self._responses
        return prompts

    def _may_take(self, unfinished: int) -> bool:
        """Return whether the engine's share has a prompt left, or need not be kept to."""
        if not self._all_have_asked and (not self._has_asked or self._taken >= self._share):
            first = int(not self._has_asked)
            self._has_asked = True
            self._all_have_asked = self._agree(lambda: self._store.add("engines", first)) >= self._replicas
        # An engine without work takes a prompt in any case: it would end its round.
        return self._all_have_asked or self._taken < self._share or not unfinished
