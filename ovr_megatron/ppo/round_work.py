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
    continued: int, complete: Collection[int], total: int, replicas: int, static: bool
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


def open_queue(
    work: RoundWork, name: str, responses: int, max_num_seqs: int, agree: Callable[[Callable[[], int]], int]
) -> Callable[[int], list[int]]:
    """Return a function that gives the engine's next prompts for the number of responses it still works on.

    All of its own come at once.  From the queue of all engines each takes the next prompt whenever it has capacity, so
    that one with short responses takes more of them.

    Args:
        work: of the engine.
        name: of the queue, unique in the process group.
        responses: to each prompt.
        max_num_seqs: responses that the engine generates at the same time.
        agree: `RolloutEngine.agree`.
    """
    remaining = list(work.prompts)
    counter = default_store(f"queue/{name}") if work.shared else None
    # Remembered, as asking costs a message to the store and a broadcast before each decoding step.
    is_empty = counter is None

    def take_next(outstanding: int) -> list[int]:
        nonlocal is_empty
        taken = list(remaining)
        remaining.clear()
        outstanding += len(taken) * responses
        while not is_empty and outstanding < max_num_seqs:
            assert counter is not None
            # Asked by the leader alone: the ranks of an engine must take the same prompts.  The store adds for one
            # rank at a time, so that no position is given to two engines.
            position = agree(lambda: counter.add("next", 1) - 1)
            is_empty = position >= len(work.shared)
            if not is_empty:
                taken.append(work.shared[position])
                outstanding += responses
        return taken

    return take_next
