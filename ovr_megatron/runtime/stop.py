"""Stop in order: a signal lets the step in progress end, then the run saves and ends."""

from __future__ import annotations

import enum
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

USER_ERROR = 2  # exit codes besides 0, finished: see docs/running.md
REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: stopped early, the same command goes on


class Stop(enum.IntEnum):
    """The stop request of a run; of several the greatest counts."""

    NO = 0
    LEAVE = 1
    LEAVE_AND_REQUEUE = 2


_MEANING = {
    signal.SIGINT: Stop.LEAVE,
    signal.SIGTERM: Stop.LEAVE_AND_REQUEUE,
    signal.SIGUSR1: Stop.LEAVE_AND_REQUEUE,  # Slurm's --signal=USR1@SECONDS
}


class StopRequested(Exception):
    """A rank was asked to stop, and all ranks have given up the work in progress, which has changed nothing yet."""


class JoinError(RuntimeError):
    """Ranks that did not come together; names the address, the missing ranks and what to look at."""


class StopRequest:
    """Remembers which signal came: Ctrl-C, SIGTERM, or the warning that Slurm sends before it ends a job.

    Python sets handlers in the main thread alone; made in another one, it hears of no signal.
    """

    def __init__(self) -> None:
        self.received = Stop.NO
        self._previous: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}
        if threading.current_thread() is threading.main_thread():
            for signal_number in _MEANING:
                self._previous[signal_number] = signal.signal(signal_number, self._remember)

    def close(self) -> None:
        """Restore the handlers that were set before; a second call does nothing."""
        for signal_number, handler in self._previous.items():
            if handler is not None:  # None: not set from Python, which cannot set it again
                signal.signal(signal_number, handler)
        self._previous.clear()

    # Runs between two instructions of the interrupted code: it only sets a flag, which the loop reads at a safe point.
    def _remember(self, signal_number: int, frame: FrameType | None) -> None:
        self.received = max(self.received, _MEANING[signal.Signals(signal_number)])
