"""Graders in processes of their own, with a hard limit of CPU time per verdict.

A response comes from a policy that is free to write ``9^9^9^9``; SymPy has no safe word.  So each verdict is made
in a worker process that is killed when its time is up and started again: a hostile expression costs one verdict.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from ovr_megatron.errors import UserError
from ovr_megatron.rewards.rules import cached_by
from ovr_megatron.rewards.verdict import WALL_FACTOR, GradeRequest, Reason, Verdict
from ovr_megatron.runtime.environment import child_environment

__all__ = ["GradeRequest", "GraderPool", "PoolError", "Reason", "Verdict"]

START_LIMIT_S = 300.0
"""Seconds that a worker may take to import its libraries, on a busy node or a slow disk; not counted as grading."""
START_ATTEMPTS = 3
"""How often in a row a worker may die before it can grade: the node's memory may have been short for a moment."""
TRIES = 2
"""Workers that a request is given to, one after the other, until one comes to a verdict."""
LEAST_WAIT_S = 0.02
"""Seconds between looks at a worker's CPU time, which the kernel counts in steps of 0.01."""


class PoolError(UserError, RuntimeError):
    """The workers cannot run at all (not: one of them was killed over a response)."""


@dataclass
class _Task:
    """A request under its key, and how often it has been given to a worker that came to no verdict.

    ``depends_on`` is what `cached_by` says of it; None where its verdict is not remembered.
    """

    key: Hashable
    request: GradeRequest
    depends_on: tuple | None
    tries: int = 0


class _Worker:
    """One grader process: starting, idle, or busy with ``task``.

    ``attempt``: how many workers before it died before they could grade.  ``fresh``: it has not graded anything yet.
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
        self.timeout_s, self.attempt = timeout_s, attempt
        self.ready = False
        self.fresh = True
        self.task: _Task | None = None
        self._began = time.monotonic()
        self._cpu_before = 0.0
        self._partial = b""

    def send(self, task: _Task) -> None:
        """Hand over one request; a worker that is gone shows it at the next `receive`."""
        assert self.process.stdin is not None
        self.task, self.fresh = task, False
        self._began, self._cpu_before = time.monotonic(), self._cpu_seconds()
        line = json.dumps(asdict(task.request))
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()

    def receive(self) -> str | None:
        """The next whole line, "" while it is incomplete, None when the process has ended."""
        assert self.process.stdout is not None
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
        """Seconds until the limit can be reached at the earliest, at most 0 when it is; None for an idle worker.

        A verdict may take ``timeout_s`` of the worker's CPU time: on a node with more work than cores the clock
        runs on while a worker waits for its turn.  `WALL_FACTOR` bounds what sleeps.
        """
        elapsed = time.monotonic() - self._began
        if not self.ready:
            return START_LIMIT_S - elapsed
        if self.task is None:
            return None
        # The clock first: most verdicts take milliseconds, and then the kernel need not be asked.
        if elapsed < self.timeout_s:
            return self.timeout_s - elapsed
        return min(self.timeout_s - (self._cpu_seconds() - self._cpu_before), WALL_FACTOR * self.timeout_s - elapsed)

    def _cpu_seconds(self) -> float:
        """CPU time of the process and of its children that have ended, by ``/proc/PID/stat`` (proc(5), 14 to 17)."""
        text = Path(f"/proc/{self.process.pid}/stat").read_text()
        ticks = text.rpartition(")")[2].split()[11:15]
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> int:
        """End the process and give back its pipes; returns its exit status."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.kill()
        status = self.process.wait()
        self.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # from what was still buffered for the dead process
            self.process.stdin.close()
        return status


class GraderPool:
    """``workers`` grader processes; each verdict takes at most ``timeout_s`` of CPU time and ``memory_mib`` of memory.

    A request whose grader dies, runs out of time or raises an error is given once more to a fresh worker; a verdict
    that then still `failed` says that nothing is known of the response.
    The processes start at once and import in the background; `grade` waits for them.  Use as a context manager.
    Not safe for use from several threads at a time.
    """

    def __init__(self, workers: int = 2, timeout_s: float = 5.0, memory_mib: int = 1024, cache: int = 65536) -> None:
        """Start the workers and return at once; ``cache`` verdicts are remembered.

        Raises:
            ValueError: fewer than one worker, or a limit that is not positive.
        """
        if workers < 1 or timeout_s <= 0:
            raise ValueError(f"a pool needs at least one worker and a positive limit, got {workers=}, {timeout_s=}")
        self.timeout_s = timeout_s
        self.memory_mib = memory_mib
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self._waiting: deque[_Task] = deque()
        self._again: deque[_Task] = deque()  # as many as there are fresh workers, at most: each failure makes one
        self._known: dict[tuple, Verdict] = {}
        self._remembered: list[tuple[Hashable, Verdict]] = []
        self._room = cache
        for _ in range(workers):
            self._start()

    def __enter__(self) -> Self:
        """Return the pool itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every worker."""
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return [worker.process.pid for worker in self._workers]

    def close(self) -> None:
        """End every worker; a second call does nothing."""
        for worker in list(self._workers):
            self._stop(worker)
        self._selector.close()

    def grade(self, requests: Sequence[GradeRequest], progress: Callable[[int], None] | None = None) -> list[Verdict]:
        """Grade ``requests``; verdicts in their order.

        Args:
            requests: responses with their references.
            progress: called with the number of verdicts just made.

        Returns:
            one verdict per request: `Reason.TIMEOUT` past the limit, `Reason.CRASH` where the worker died, and
            `Reason.RAISED` where the user's rule raised an error, each in `TRIES` workers.

        Raises:
            PoolError: workers do not start, or the pool is closed.
        """
        verdicts: dict[Hashable, Verdict] = {}
        try:
            for number, request in enumerate(requests):
                self.submit(number, request)
            while self.pending:
                done = self.collect()
                verdicts.update(done)
                if progress is not None and done:
                    progress(len(done))
        finally:
            self.forget()  # only after an interruption is there anything left: its verdicts belong to no later call
        return [verdicts[number] for number in range(len(requests))]

    @property
    def pending(self) -> int:
        """Requests submitted whose verdicts were not yet collected."""
        busy = sum(worker.task is not None for worker in self._workers)
        return len(self._remembered) + len(self._waiting) + len(self._again) + busy

    def submit(self, key: Hashable, request: GradeRequest) -> None:
        """Have ``request`` graded; `collect` returns its verdict under ``key``.

        Raises:
            PoolError: the pool is closed.
        """
        if not self._workers:
            raise PoolError("the grader pool is closed; make a new one")
        depends_on = cached_by(request) if self._room else None
        if depends_on in self._known:
            self._remembered.append((key, self._known[depends_on]))
            return
        self._waiting.append(_Task(key, request, depends_on))
        self._hand_out()

    def collect(self, wait: bool = True) -> list[tuple[Hashable, Verdict]]:
        """Verdicts that came since the last call, as (key, verdict); without ``wait`` those that are there now.

        Waiting ends with the next event, which need not be a verdict.

        Raises:
            PoolError: workers do not start.
        """
        done, self._remembered = self._remembered, []
        limits = [left for worker in self._workers if (left := worker.time_left()) is not None]
        patience = max(LEAST_WAIT_S, min(limits, default=0.0)) if wait and not done else 0.0
        for event, _ in self._selector.select(patience):
            done += self._hear(event.data)
        for worker in list(self._workers):
            left = worker.time_left()
            if left is not None and left <= 0:
                done += self._lost(worker, Verdict(Reason.TIMEOUT))
        self._hand_out()
        return done

    def forget(self) -> None:
        """Drop what was submitted and not yet collected."""
        self._waiting.clear()
        self._again.clear()
        self._remembered.clear()
        for worker in [worker for worker in self._workers if worker.task is not None]:
            self._stop(worker)
            self._start()

    def _hear(self, worker: _Worker) -> list[tuple[Hashable, Verdict]]:
        """Take what ``worker`` says, or that it is gone."""
        line = worker.receive()
        if line is None:
            return self._lost(worker, Verdict(Reason.CRASH))
        if not line:
            return []
        if not worker.ready:
            worker.ready = True
            return []
        task, raw = worker.task, json.loads(line)
        if task is None:
            return []
        verdict = Verdict(Reason(raw["reason"]), raw["box"], raw["score"])
        if verdict.failed and task.tries + 1 < TRIES:
            return self._lost(worker, verdict)
        worker.task = None
        if verdict.failed:
            return [(task.key, verdict)]
        if task.depends_on is not None and len(self._known) < self._room:
            self._known[task.depends_on] = verdict
        return [(task.key, verdict)]

    def _hand_out(self) -> None:
        """Give idle workers something to do; requests that failed go to fresh ones, and before all others."""
        for worker in self._workers:
            if not worker.ready or worker.task is not None:
                continue
            if self._again and worker.fresh:
                worker.send(self._again.popleft())
            elif self._waiting:
                worker.send(self._waiting.popleft())

    def _lost(self, worker: _Worker, verdict: Verdict) -> list[tuple[Hashable, Verdict]]:
        """Replace ``worker``, which failed; returns ``verdict`` on its task, unless that is tried once more.

        Raises:
            PoolError: workers do not start.
        """
        status = self._stop(worker)
        if status in (-signal.SIGPROF, -signal.SIGALRM):  # its own alarm, while nobody looked
            verdict = Verdict(Reason.TIMEOUT)
        attempt = worker.attempt + 1 if not worker.ready else 0
        if attempt >= START_ATTEMPTS or (attempt and verdict.reason is Reason.TIMEOUT):
            self.close()
            raise PoolError(
                f"a grader worker did not start (exit status {status}); run `python -m ovr_megatron.rewards.worker "
                f"</dev/null` to see why, and give it more memory if it needs more than memory_mib={self.memory_mib}"
            )
        self._start(attempt)
        task = worker.task
        if task is None:
            return []
        task.tries += 1
        if task.tries < TRIES:
            self._again.append(task)
            return []
        return [(task.key, verdict)]

    def _start(self, attempt: int = 0) -> None:
        worker = _Worker(self.timeout_s, self.memory_mib, attempt)
        assert worker.process.stdout is not None
        self._workers.append(worker)
        self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    def _stop(self, worker: _Worker) -> int:
        """End ``worker``; returns its exit status."""
        assert worker.process.stdout is not None
        self._selector.unregister(worker.process.stdout)
        self._workers.remove(worker)
        return worker.kill()
