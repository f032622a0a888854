"""End a run that makes no progress, with a message and the stacks of every rank.

Progress is an engine step, a pack, a file of weights: the code that does such work calls `touch`.  So one limit
fits a run whose iteration takes seconds and one whose iteration takes hours.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType

_RENEW_SHARE = 0.02  # of the limit: a touch sooner after the last one costs a comparison and does nothing
# A rank that hangs stays for this share of the limit, so that the ranks that wait for it notice and write their stacks.
# Its end takes them along: their collectives fail, and a launcher stops the processes of its node.
_GRACE_SHARE = 0.2
_LONGEST_GRACE_S = 60.0
_LOOKS = 5  # times that a rank looks for the stacks of others within the grace
_STDERR = 2
_active: Watchdog | None = None
_listener: Callable[[], None] | None = None


def touch() -> None:
    """Report progress to this process's `Watchdog` and to the function of `listen`, where there are such."""
    defer()
    if _listener is not None:
        _listener()


def defer() -> None:
    """Begin the limit anew for a process that waits, as the processes that it waits for make progress."""
    if _active is not None:
        _active.touch()


def listen(listener: Callable[[], None] | None) -> Callable[[], None] | None:
    """Have ``listener`` called at each `touch`, in the thread that makes progress; return the former one."""
    global _listener
    previous = _listener
    _listener = listener
    return previous


def is_watching() -> bool:
    """Return whether this process has a `Watchdog`."""
    return _active is not None


class Watchdog:
    """End this process with code 1 when nobody has called `touch` for ``timeout_s`` seconds (0: never).

    A thread prints the line that the process stands at to stderr and writes all Python stacks to
    ``RUN/logs/stacks_rank_N.txt``.  It also writes them when another rank has written its own, because that rank is
    about to end.  It needs the interpreter's lock.  Where a library never releases that, a timer of `faulthandler`,
    which needs no lock, writes the stacks to stderr and ends the process a tenth of the limit later.
    """

    def __init__(self, run: Path, timeout_s: float):
        self.timeout_s = timeout_s
        self.rank = int(os.environ.get("RANK", "0"))
        self.path = run / "logs" / f"stacks_rank_{self.rank}.txt"
        self._grace_s = min(_GRACE_SHARE * timeout_s, _LONGEST_GRACE_S)
        self._closed = threading.Event()
        self._deadline = 0.0
        self._written = False
        # Files of an earlier launch stay in the folder; what grows after this is of this launch.
        self._sizes = self._sizes_of_stacks()

    def touch(self) -> None:
        """Begin the limit anew."""
        now = time.monotonic()
        if not self.timeout_s or now < self._deadline - (1 - _RENEW_SHARE) * self.timeout_s:
            return
        self._deadline = now + self.timeout_s
        # Later than the thread, whose message says more: this one is for a process whose thread cannot run.
        faulthandler.dump_traceback_later(1.1 * self.timeout_s + 1, file=_STDERR, exit=True)

    def _watch(self) -> None:
        answered = False
        while not self._closed.wait(max(0.0, min(self._deadline - time.monotonic(), self._grace_s / _LOOKS))):
            if time.monotonic() >= self._deadline:
                self._end()
            if not answered and self._sizes_of_stacks() != self._sizes:
                answered = True
                self._write_stacks()

    def _end(self) -> None:
        # This thread runs, so the timer that ends the process without the interpreter's lock is not needed.
        faulthandler.cancel_dump_traceback_later()
        line = _innermost(sys._current_frames().get(threading.main_thread().ident or 0))
        stacks = self._write_stacks()
        print(
            f"hang: rank {self.rank} on {socket.gethostname()} has made no progress for "
            f"run.hang_timeout_s={self.timeout_s:g} s, at {line}; {stacks}; it ends with code 1, and the same command "
            "goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(self._grace_s)
        # Not sys.exit: the main thread hangs, and exit handlers could wait for it.
        os._exit(1)

    def _write_stacks(self) -> str:
        """Append the stacks of all threads to the file of this rank, once; return a clause that says where they are."""
        if self._written:
            return f"its stacks are in {self.path}"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(f"process {os.getpid()} on {socket.gethostname()}, run.hang_timeout_s={self.timeout_s:g}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            self._written = True
        except OSError as error:
            return f"its stacks could not be written to {self.path} ({error.strerror})"
        return f"its stacks are in {self.path}"

    def _sizes_of_stacks(self) -> dict[str, int]:
        """Return the size of each file of stacks in the run folder, in bytes."""
        sizes = {}
        for path in self.path.parent.glob("stacks_rank_*.txt"):
            try:
                sizes[path.name] = path.stat().st_size
            except OSError:
                continue  # removed in between
        return sizes

    def __enter__(self) -> Watchdog:
        global _active
        if self.timeout_s:
            _active = self
            self.touch()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _active
        if self.timeout_s:
            _active = None
            self._closed.set()
            faulthandler.cancel_dump_traceback_later()


def _innermost(frame: FrameType | None) -> str:
    """Return the innermost line of this package on the stack, else the innermost of all."""
    package = f"{Path(__file__).parents[1]}{os.sep}"
    top = frame
    while frame is not None and not frame.f_code.co_filename.startswith(package):
        frame = frame.f_back
    frame = frame or top
    if frame is None:
        return "an unknown line"
    return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"
