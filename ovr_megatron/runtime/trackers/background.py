"""Keep a tracker's network and its errors away from training: its calls run in a thread of their own."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from queue import Full, Queue
from threading import Thread

from ovr_megatron.runtime.logs import get_logger
from ovr_megatron.runtime.trackers.protocol import Tracker

logger = get_logger(__name__)

WAITING_CALLS = 10_000
CLOSE_S = 30.0  # less than a batch system leaves between its signal and the end
_SECRET_NAMES = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
_SECRET_LENGTH = 6  # a shorter value is no secret, and would be replaced within words
_LOGIN = re.compile(r"(://)[^/@\s]+@|([?&]\w*(?:token|key|secret|password)\w*=)[^&\s]+", re.IGNORECASE)
_MAX_TEXT = 300


class BackgroundTracker:
    """Passes calls on to ``tracker`` in a thread, in order, and returns at once.

    The first error of the tracker is a warning, and so is the first call that is lost because `WAITING_CALLS` wait.
    Training goes on, and each later call is tried anew.
    """

    def __init__(self, name: str, tracker: Tracker):
        self.name = name
        self.tracker = tracker
        self._warned = False
        self._calls: Queue[Callable[[], None] | None] = Queue(WAITING_CALLS)
        # A daemon: a service that does not answer must not keep the process from ending.
        self._thread = Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue the metrics."""
        self._put(partial(self.tracker.log, step, dict(metrics)))

    def log_text(self, step: int, name: str, text: str) -> None:
        """Queue the text."""
        self._put(partial(self.tracker.log_text, step, name, text))

    def close(self) -> None:
        """Close the tracker after the calls that wait, but wait for it at most `CLOSE_S` seconds."""
        deadline = time.monotonic() + CLOSE_S
        with suppress(Full):  # of a tracker that hangs
            self._calls.put(None, timeout=CLOSE_S)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logger.warning(f"tracker {self.name} did not finish within {CLOSE_S:g} s; its last records may be missing")

    def _put(self, call: Callable[[], None]) -> None:
        try:
            self._calls.put_nowait(call)
        except Full:
            self._warn("it is too slow, and records are lost")

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            self._try(call)
        self._try(self.tracker.close)

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._warn(describe(error))

    def _warn(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                f"tracker {self.name}: {problem}; training goes on, further errors of this tracker are not shown, and "
                "it may lack records"
            )


def describe(error: BaseException) -> str:
    """Return the class and the first line of ``error``, without secrets of the environment and of addresses."""
    text = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    for name, value in os.environ.items():
        if _SECRET_NAMES.search(name) and len(value) >= _SECRET_LENGTH:
            text = text.replace(value, "***")
    return _LOGIN.sub(lambda match: f"{match[1]}***@" if match[1] else f"{match[2]}***", text)[:_MAX_TEXT]
