"""A barrier after work that takes each rank a different time, as generation does."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from ovr_megatron.runtime import watchdog
from ovr_megatron.runtime.distributed import default_store, patient_group
from ovr_megatron.runtime.stop import Stop, StopRequest, StopRequested

_REPORT_S = 1.0  # between two reports of a rank: the store is one process for all ranks
_CHECK_EVERY = 16  # steps between two checks of the stop request, each a broadcast within an engine
_FIRST_PAUSE_S = 0.002
_LONGEST_PAUSE_S = 0.25
_BUSY_PAUSE_S = 0.02  # where others wait for what this rank does meanwhile


class WorkBarrier:
    """Counts the steps of all ranks while each works independently, and waits for the last rank.

    A rank that is done and waits in an ordinary collective cannot tell a slow rank from one that hangs, so the
    time-out of collectives would have to exceed the longest generation; and it does not react to a signal.  Here it
    waits for as long as any rank makes steps.  A rank that dies ends the wait at once: the barrier itself is a
    collective, of a group whose time-out is out of reach.

    Args:
        name: unique among all barriers of the run.
        request: the stop request of this rank's signals; None where the work is always done to its end.
    """

    def __init__(self, name: str, request: StopRequest | None = None):
        self._store = default_store(f"work/{name}")
        self._request = request
        self._next_report = 0.0
        self._signal_published = False
        self._engine_steps = itertools.count()
        self.stopped = False  # whether this rank has left its work early

    def step(self) -> None:
        """Report a step of this rank to its watchdog and, at most once a second, to the ranks that wait."""
        watchdog.touch()
        self._publish_signal()
        now = time.monotonic()
        if now >= self._next_report:
            self._next_report = now + _REPORT_S
            self._store.add("steps", 1)

    def engine_step(self, agree: Callable[[Callable[[], int]], int]) -> bool:
        """Report a step, and return whether the engine's ranks stop after it because any rank was asked to.

        ``agree`` (`RolloutEngine.agree`) gives the engine's ranks, which make their steps together, the same answer.
        """
        self.step()
        if self._request is not None and next(self._engine_steps) % _CHECK_EVERY == 0:
            self.stopped = bool(agree(lambda: int(self.stop_asked())))
        return self.stopped

    def stop_asked(self) -> bool:
        """Return whether any rank has been asked to stop so far; ranks may see it at different steps."""
        if self._request is None:
            return False
        self._publish_signal()
        return self._store.add("stop", 0) > 0

    def wait(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Wait for every rank, for as long as any of them reports steps.  A collective.

        Args:
            meanwhile: called again and again while this rank waits.

        Raises:
            RuntimeError: a rank has died.
            StopRequested: on all ranks, as one was asked to stop, also where the work is done: what follows takes
                minutes that a job at its limit may not have.
        """
        barrier = dist.barrier(patient_group(), async_op=True)
        assert barrier is not None
        last_steps = -1
        pause = _FIRST_PAUSE_S
        # Polled, as a wait inside the collective would neither see steps of others nor let signals through.
        while not barrier.is_completed():
            self._publish_signal()
            steps = self._store.add("steps", 0)
            if steps != last_steps:
                watchdog.touch()
            last_steps = steps
            if meanwhile is not None:
                meanwhile()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S if meanwhile is None else _BUSY_PAUSE_S)
        barrier.wait()  # raises where a rank has died
        if self._request is None:
            return
        # Ranks may have heard of a request at different times; an all-reduce gives all of them the same answer.
        flag = torch.tensor(int(self.stopped or self._request.received > Stop.NO))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        if flag:
            raise StopRequested

    def _publish_signal(self) -> None:
        if self._request is not None and self._request.received > Stop.NO and not self._signal_published:
            self._signal_published = True
            self._store.add("stop", 1)
