"""A run that stands still ends, and leaves the stacks of every rank behind."""

from __future__ import annotations

import faulthandler
import os
import socket
from pathlib import Path
from types import TracebackType


class Watchdog:
    """Ends this process with code 1 when `touch` has not been called for ``timeout_s`` seconds (0: never).

    All Python stacks go to ``RUN/logs/stacks_rank_N.txt`` first.  The timer is a thread of the interpreter's own that
    needs no lock of it, so that a process stuck inside a library ends, too.  It runs from the first `touch` on.
    """

    def __init__(self, run: Path, rank: int, timeout_s: float):
        self.timeout_s = timeout_s
        self.path = run / "logs" / f"stacks_rank_{rank}.txt"
        if timeout_s:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a")
            self.file.write(f"process {os.getpid()} on {socket.gethostname()}, run.hang_timeout_s={timeout_s:g}\n")
            self.file.flush()

    def touch(self) -> None:
        """Say that there is progress."""
        if self.timeout_s:
            faulthandler.dump_traceback_later(self.timeout_s, file=self.file, exit=True)

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.timeout_s:
            faulthandler.cancel_dump_traceback_later()
            self.file.close()
