"""A barrier at the end of work that takes every rank another time, as generation does."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from ovr_megatron.runtime import watchdog
from ovr_megatron.runtime.distributed import default_store, patient_group
from ovr_megatron.runtime.stop import Stop, StopRequest, StopRequested

_REPORT_S = 1.0  # at most so often a rank says that it works: the store is one process for all ranks
_LOOK_EVERY = 16  # steps between two looks at the stop request, each a broadcast within an engine
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.25


class WorkBarrier:
    """The steps of all ranks while each works on its own, and the end of the last.

    A rank that is done and waits in a collective cannot tell a slow rank from one that hangs, so that the time-out of
    collectives would have to exceed the longest generation; and it does not hear a signal.  Here it waits for as long
    as any rank makes steps.  A rank that dies ends the wait at once: the barrier itself is a collective, of a group
    whose time-out is out of reach.

    Args:
        name: unique among all barriers of the run.
        request: what this rank was asked for by signals; None where nothing is left early.
    """

    def __init__(self, name: str, request: StopRequest | None = None):
        self._store, self._request = default_store(f"work/{name}"), request
        self._next_report, self._told = 0.0, False
        self._looks = itertools.count()
        self.stopped = False  # whether this rank has left its work early

    def step(self) -> None:
        """Report a step of this rank to its watchdog and, at most once a second, to the ranks that wait."""
        watchdog.touch()
        self._tell_of_signal()
        now = time.monotonic()
        if now >= self._next_report:
            self._next_report = now + _REPORT_S
            self._store.add("steps", 1)

    def engine_step(self, agree: Callable[[Callable[[], int]], int]) -> bool:
        """Report a step, and return whether the engine's ranks are to leave their work after it, as one was asked to.

        ``agree`` (`RolloutEngine.agree`) gives the engine's ranks, which make their steps together, one answer.
        """
        self.step()
        if self._request is not None and next(self._looks) % _LOOK_EVERY == 0:
            self.stopped = bool(agree(lambda: int(self.stop_asked())))
        return self.stopped

    def stop_asked(self) -> bool:
        """Whether any rank has been asked to stop so far; ranks may see it at different steps."""
        if self._request is None:
            return False
        self._tell_of_signal()
        return self._store.add("stop", 0) > 0

    def wait(self) -> None:
        """Wait for every rank, for as long as any of them reports steps.  A collective.

        Raises:
            RuntimeError: a rank has died.
            StopRequested: on all ranks, as one was asked to stop, also where the work is done: what follows takes
                minutes that a job at its limit may not have.
        """
        barrier = dist.barrier(patient_group(), async_op=True)
        assert barrier is not None
        seen, pause = -1, _FIRST_PAUSE_S
        while not barrier.is_completed():
            self._tell_of_signal()
            steps = self._store.add("steps", 0)
            if steps != seen:
                watchdog.touch()
            seen = steps
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        barrier.wait()
        if self._request is None:
            return
        flag = torch.tensor(int(self.stopped or self._request.received > Stop.NO))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        if flag:
            raise StopRequested

    def _tell_of_signal(self) -> None:
        if self._request is not None and self._request.received > Stop.NO and not self._told:
            self._told = True
            self._store.add("stop", 1)
