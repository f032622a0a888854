"""One grader process of a pool, and the request that it grades."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

from ovr_megatron.rewards.request_json import request_to_json
from ovr_megatron.rewards.verdict import WALL_FACTOR, GradeRequest
from ovr_megatron.runtime.environment import child_environment

START_LIMIT_S = 300.0
"""Seconds that a worker may take to import its libraries, on a busy node or a slow disk; not counted as grading."""


@dataclass
class GraderTask:
    """A request to grade.

    Attributes:
        key: The caller's key of the request.
        request: The request.
        cache_key: Key of the verdict in the cache; None if it is not cached.
        tries: Number of workers that came to no verdict.
        has_row: Whether the worker that has the request has its row, too.
    """

    key: Hashable
    request: GradeRequest
    cache_key: tuple[object, ...] | None
    tries: int = 0
    has_row: bool = False


class GraderProcess:
    """One grader process: starting, idle, or busy with ``task``.

    Attributes:
        process: The process.
        timeout_s: Limit of CPU time of a verdict.
        attempt: Number of predecessors in a row that died before they could grade.
        ready: Whether it can grade.
        fresh: Whether it has not graded anything yet.
        task: The request that it grades now.
    """

    def __init__(self, timeout_s: float, memory_mib: int, attempt: int = 0) -> None:
        """Start the process and return at once."""
        limits = ["--timeout-s", str(timeout_s), "--memory-mib", str(memory_mib)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ovr_megatron.rewards.worker", *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child_environment(os.environ),
        )
        self.timeout_s = timeout_s
        self.attempt = attempt
        self.ready = False
        self.fresh = True
        self.task: GraderTask | None = None
        self._start_time = time.monotonic()  # of the process, then of each task
        self._start_cpu = 0.0  # CPU time of the process at the start of the task
        self._partial = b""  # output after the last complete line

    def send(self, task: GraderTask, with_row: bool) -> None:
        """Send a request to the worker; if the worker has died, the next `receive` returns None."""
        assert self.process.stdin is not None
        self.task = task
        task.has_row = with_row
        self.fresh = False
        self._start_time = time.monotonic()
        self._start_cpu = self._cpu_seconds()
        line = json.dumps(request_to_json(task.request, with_row))
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()

    def receive(self) -> str | None:
        """Return the next complete line, "" while it is incomplete, None if the process has ended."""
        assert self.process.stdout is not None
        # os.read returns the bytes that are there; the file object would wait for a full buffer.
        chunk = os.read(self.process.stdout.fileno(), 1 << 16)
        if not chunk:
            return None
        self._partial += chunk
        line, newline, rest = self._partial.partition(b"\n")
        if not newline:
            return ""
        self._partial = rest
        return line.decode()

    def time_left(self) -> float | None:
        """Return the seconds until the limit can be reached at the earliest; None for an idle worker.

        The result is 0 or less once the limit is reached.  A verdict may take ``timeout_s`` of the worker's CPU time:
        on a node with more work than cores, wall time passes while a worker waits for its turn.  `WALL_FACTOR` bounds
        the wall time of a worker that sleeps.
        """
        elapsed = time.monotonic() - self._start_time
        if not self.ready:
            return START_LIMIT_S - elapsed
        if self.task is None:
            return None
        # The clock first: most verdicts take milliseconds, so the kernel need not be asked for the CPU time.
        if elapsed < self.timeout_s:
            return self.timeout_s - elapsed
        cpu_left = self.timeout_s - (self._cpu_seconds() - self._start_cpu)
        return min(cpu_left, WALL_FACTOR * self.timeout_s - elapsed)

    def _cpu_seconds(self) -> float:
        """Return the CPU time of the process and its ended children (``/proc/PID/stat``, proc(5), fields 14 to 17)."""
        text = Path(f"/proc/{self.process.pid}/stat").read_text()
        # Field 2, the name in brackets, may hold spaces; field 3 is the first one behind it.
        _, _, fields = text.rpartition(")")
        ticks = fields.split()[11:15]
        total = sum(map(int, ticks))
        return total / os.sysconf("SC_CLK_TCK")

    def kill(self) -> int:
        """Kill the process and close its pipes; return its exit status."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.kill()
        status = self.process.wait()
        self.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # closing flushes input that the dead process has not read
            self.process.stdin.close()
        return status
