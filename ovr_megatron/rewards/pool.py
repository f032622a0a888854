"""Graders in processes of their own, with a hard time limit per verdict.

A response comes from a policy that is free to write ``9^9^9^9``; SymPy has no safe word.  So each verdict is made
in a worker process that is killed when the time is up and started again: a hostile expression costs one verdict.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

import ovr_megatron
from ovr_megatron.rewards.rules import cached_by
from ovr_megatron.rewards.verdict import GradeRequest, Reason, Verdict

__all__ = ["GradeRequest", "GraderPool", "PoolError", "Reason", "Verdict"]

START_LIMIT_S = 120.0
"""Seconds that a worker may take to import its libraries; not counted as grading."""


class PoolError(RuntimeError):
    """The workers cannot run at all (not: one of them was killed over a response)."""


class _Worker:
    """One grader process, starting, idle, or busy with the request of key ``task``."""

    def __init__(self, timeout_s: float, memory_mib: int) -> None:
        """Start the process and return at once."""
        root = str(Path(ovr_megatron.__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        limits = ["--timeout-s", str(timeout_s), "--memory-mib", str(memory_mib)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ovr_megatron.rewards.worker", *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.ready = False
        self.task: Hashable | None = None
        self.deadline = time.monotonic() + START_LIMIT_S
        self._partial = b""

    def send(self, task: Hashable, request: GradeRequest, timeout_s: float) -> None:
        """Hand over one request; a worker that is gone shows it at the next `receive`."""
        assert self.process.stdin is not None
        self.task, self.deadline = task, time.monotonic() + timeout_s
        line = json.dumps(asdict(request))
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

    def kill(self) -> None:
        """End the process and give back its pipes."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # from what was still buffered for the dead process
            self.process.stdin.close()


class GraderPool:
    """``workers`` grader processes; each verdict takes at most ``timeout_s`` seconds and ``memory_mib`` of memory.

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
        self._waiting: deque[tuple[Hashable, GradeRequest]] = deque()
        self._known: dict[tuple, Verdict] = {}
        self._told: list[tuple[Hashable, Verdict]] = []
        self._names: dict[Hashable, tuple] = {}
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
            one verdict per request: `Reason.TIMEOUT` past the limit, `Reason.CRASH` where the worker died.

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
        return len(self._told) + len(self._waiting) + sum(worker.task is not None for worker in self._workers)

    def submit(self, key: Hashable, request: GradeRequest) -> None:
        """Have ``request`` graded; `collect` returns its verdict under ``key``.

        Raises:
            PoolError: the pool is closed.
        """
        if not self._workers:
            raise PoolError("the grader pool is closed; make a new one")
        name = cached_by(request) if self._room else None
        if name in self._known:
            self._told.append((key, self._known[name]))
            return
        if name is not None:
            self._names[key] = name
        self._waiting.append((key, request))
        self._hand_out()

    def collect(self, wait: bool = True) -> list[tuple[Hashable, Verdict]]:
        """Verdicts that came since the last call, as (key, verdict); without ``wait`` those that are there now.

        Waiting ends with the next event, which need not be a verdict.

        Raises:
            PoolError: workers do not start.
        """
        done, self._told = self._told, []
        wait = wait and not done
        working = [worker.deadline for worker in self._workers if worker.task is not None or not worker.ready]
        patience = max(0.0, min(working, default=0.0) - time.monotonic()) if wait else 0.0
        for ready, _ in self._selector.select(patience):
            worker: _Worker = ready.data
            line = worker.receive()
            if line is None:
                done += self._lost(worker, Reason.CRASH)
            elif line and worker.task is None:
                worker.ready = True
            elif line:
                raw = json.loads(line)
                verdict = Verdict(Reason(raw["reason"]), raw["box"], raw["score"])
                self._remember(worker.task, verdict)
                done.append((worker.task, verdict))
                worker.task = None
        now = time.monotonic()
        for worker in list(self._workers):
            if (worker.task is not None or not worker.ready) and now >= worker.deadline:
                done += self._lost(worker, Reason.TIMEOUT)
        self._hand_out()
        return done

    def forget(self) -> None:
        """Drop what was submitted and not yet collected."""
        self._waiting.clear()
        self._told.clear()
        self._names.clear()
        for worker in [worker for worker in self._workers if worker.task is not None]:
            self._replace(worker)

    def _remember(self, key: Hashable, verdict: Verdict) -> None:
        name = self._names.pop(key, None)
        if name is not None and len(self._known) < self._room:
            self._known[name] = verdict

    def _hand_out(self) -> None:
        for worker in self._workers:
            if self._waiting and worker.ready and worker.task is None:
                worker.send(*self._waiting.popleft(), self.timeout_s)

    def _lost(self, worker: _Worker, reason: Reason) -> list[tuple[Hashable, Verdict]]:
        if not worker.ready:
            self.close()
            raise PoolError(
                "a grader worker did not start; run `python -m ovr_megatron.rewards.worker </dev/null` to see why, and "
                f"give it more memory if it needs more than memory_mib={self.memory_mib}"
            )
        self._names.pop(worker.task, None)
        self._replace(worker)
        return [] if worker.task is None else [(worker.task, Verdict(reason))]

    def _start(self) -> None:
        worker = _Worker(self.timeout_s, self.memory_mib)
        assert worker.process.stdout is not None
        self._workers.append(worker)
        self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    def _stop(self, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        self._selector.unregister(worker.process.stdout)
        self._workers.remove(worker)
        worker.kill()

    def _replace(self, worker: _Worker) -> None:
        self._stop(worker)
        self._start()
