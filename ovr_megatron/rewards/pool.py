"""A pool of grader processes, with a hard limit of CPU time per verdict.

A response comes from a policy that is free to write ``9^9^9^9``, and SymPy cannot be interrupted.  So each verdict is
made in a worker process that is killed and replaced when its time is up: a hostile expression costs one verdict.
"""

from __future__ import annotations

import json
import selectors
import signal
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import NamedTuple, Self

from ovr_megatron.errors import UserError
from ovr_megatron.rewards.combination import combine, weights_of
from ovr_megatron.rewards.grader_process import GraderProcess, GraderTask
from ovr_megatron.rewards.judge_client import JudgeClient, Judges
from ovr_megatron.rewards.rules import cache_key, is_judge, resolved
from ovr_megatron.rewards.verdict import FINAL, GradeRequest, Reason, RewardRule, RuleError, Verdict

__all__ = ["GradeRequest", "GraderPool", "PoolError", "Reason", "Verdict"]

START_ATTEMPTS = 3
"""Attempts in a row to start a worker: the node's memory may have been short for a moment."""
TRIES = 2
"""Workers that try a request, one after the other, until one comes to a verdict."""
_JUDGE_WAIT_S = 1.0  # between looks at the judges' process, whose output ends the wait
LEAST_WAIT_S = 0.02
"""Seconds at least between readings of a worker's CPU time, which the kernel counts in steps of 0.01."""


class PoolError(UserError, RuntimeError):
    """The workers cannot run at all; that one of them is killed over a response is no error."""


@dataclass(eq=False)
class _Joint:
    """A request with weighted rules, and the verdicts that there are; ``key`` is the caller's."""

    key: Hashable
    weights: Mapping[str, float]
    verdicts: dict[str, Verdict] = field(default_factory=dict)


class _PartKey(NamedTuple):
    """Key of the request of one of a joint's rules."""

    joint: _Joint
    rule: str


class GraderPool:
    """``workers`` grader processes; each verdict takes at most ``timeout_s`` of CPU time and ``memory_mib`` of memory.

    A request whose grader dies, runs out of time or raises an error is tried once more by a fresh worker; a verdict
    that then still `failed` says nothing of the response.  The processes start at once and import in the background;
    `grade` waits for them.  Use as a context manager.  Not safe for use from several threads at a time.
    """

    def __init__(
        self,
        workers: int = 2,
        timeout_s: float = 5.0,
        memory_mib: int = 1024,
        cache: int = 65536,
        judges: Judges | None = None,
    ) -> None:
        """Start the workers and return at once; at most ``cache`` verdicts are cached, beside those of ``judges``.

        Raises:
            ValueError: fewer than one worker, or a limit that is not positive.
            RuleError: the template of a judge cannot be used.
        """
        if workers < 1 or timeout_s <= 0:
            raise ValueError(f"a pool needs at least one worker and a positive limit, got {workers=}, {timeout_s=}")
        self.timeout_s = timeout_s
        self.memory_mib = memory_mib
        self._selector = selectors.DefaultSelector()
        self._workers: list[GraderProcess] = []
        self._waiting: deque[GraderTask] = deque()
        # At most as many as there are fresh workers, since each failure makes one.
        self._retries: deque[GraderTask] = deque()
        self._cache: dict[tuple[object, ...], Verdict] = {}
        self._cache_size = cache
        self._row_rules: set[RewardRule] = set()  # of functions that take the row
        self._ready: list[tuple[Hashable, Verdict]] = []  # verdicts without a worker, not yet collected
        self._judges = JudgeClient(judges, self._selector) if judges is not None and judges.settings else None
        for _ in range(workers):
            self._start()

    def __enter__(self) -> Self:
        """Return the pool itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End every worker."""
        self.close()

    def close(self) -> None:
        """End every worker; a second call does nothing."""
        for worker in list(self._workers):
            self._stop(worker)
        if self._judges:
            self._judges.close()
        self._selector.close()

    def grade(self, requests: Sequence[GradeRequest], progress: Callable[[int], None] | None = None) -> list[Verdict]:
        """Grade ``requests`` and return the verdicts in their order.

        Args:
            requests: responses with their references.
            progress: called with the number of new verdicts.

        Returns:
            one verdict per request: `Reason.TIMEOUT` past the limit, `Reason.CRASH` where the worker died, and
            `Reason.RAISED` where the user's rule raised an error, each in `TRIES` workers.

        Raises:
            PoolError: workers do not start, or the pool is closed.
        """
        verdicts: dict[Hashable, Verdict] = {}
        try:
            for index, request in enumerate(requests):
                self.submit(index, request)
            while self.pending:
                collected = self.collect()
                verdicts.update(collected)
                if progress is not None and collected:
                    progress(len(collected))
        finally:
            # Requests are left only after an interruption; their verdicts must not appear in a later call.
            self.cancel()
        return [verdicts[index] for index in range(len(requests))]

    @property
    def pending(self) -> int:
        """Return the number of submitted requests whose verdicts have not been collected; each weighted rule is one."""
        busy = sum(worker.task is not None for worker in self._workers)
        questions = self._judges.pending if self._judges else 0
        return len(self._ready) + len(self._waiting) + len(self._retries) + busy + questions

    def take_judge_counts(self) -> dict[str, float]:
        """Return requests, tokens and outcomes of the judges since the last call; empty without judges."""
        return self._judges.take_counts() if self._judges else {}

    def submit(self, key: Hashable, request: GradeRequest) -> None:
        """Submit a request; `collect` returns its verdict with ``key``.  Weighted rules are graded side by side.

        Raises:
            PoolError: the pool is closed.
        """
        if not self._workers:
            raise PoolError("the grader pool is closed; make a new one")
        if isinstance(request.rule, str):
            self._submit(key, replace(request, rule=resolved(request.rule, request.row)))
            return
        joint = _Joint(key, weights_of(request.rule))
        for name in joint.weights:
            self._submit(_PartKey(joint, name), replace(request, rule=resolved(name, request.row)))

    def _submit(self, key: Hashable, request: GradeRequest) -> None:
        """Submit a request with a single rule."""
        assert isinstance(request.rule, str)
        if is_judge(request.rule):
            self._ask_judge(key, request)
            return
        verdict_key = cache_key(request) if self._cache_size else None
        if verdict_key in self._cache:
            self._ready.append((key, self._cache[verdict_key]))
            return
        self._waiting.append(GraderTask(key, request, verdict_key))
        self._dispatch()

    def collect(self, wait: bool = True) -> list[tuple[Hashable, Verdict]]:
        """Return the (key, verdict) pairs since the last call; without ``wait`` those that are there now.

        Waiting ends with the next event, which need not be a verdict.

        Raises:
            PoolError: workers do not start.
        """
        collected = self._ready
        self._ready = []
        timeout = self._wait_s() if wait and not collected else 0.0
        for event, _ in self._selector.select(timeout):
            if isinstance(event.data, GraderProcess):
                collected += self._receive(event.data)
            else:
                collected += event.data.receive()
        # After the output: a verdict that came just in time counts.
        for worker in list(self._workers):
            seconds = worker.time_left()
            if seconds is not None and seconds <= 0:
                collected += self._replace(worker, Verdict(Reason.TIMEOUT))
        self._dispatch()
        return list(_join(collected))

    def _wait_s(self) -> float:
        """Return the seconds until the first worker can reach its limit, at least `LEAST_WAIT_S`."""
        limits = []
        for worker in self._workers:
            seconds = worker.time_left()
            if seconds is not None:  # an idle worker has no limit
                limits.append(seconds)
        has_questions = self._judges is not None and self._judges.pending > 0
        earliest = min(limits, default=_JUDGE_WAIT_S if has_questions else 0.0)
        return max(LEAST_WAIT_S, earliest)

    def cancel(self) -> None:
        """Drop all requests whose verdicts have not been collected."""
        self._waiting.clear()
        self._retries.clear()
        self._ready.clear()
        if self._judges:
            self._judges.cancel()
        busy = [worker for worker in self._workers if worker.task is not None]
        # Killed: a verdict that is already under way must not arrive under the key of a later request.
        for worker in busy:
            self._stop(worker)
            self._start()

    def _receive(self, worker: GraderProcess) -> list[tuple[Hashable, Verdict]]:
        """Read a worker's output; return its verdict, if there is a final one."""
        line = worker.receive()
        if line is None:
            return self._replace(worker, Verdict(Reason.CRASH))
        if not line:
            return []
        if not worker.ready:
            worker.ready = True
            return []
        raw = json.loads(line)
        task = worker.task
        if task is None:
            return []
        verdict = Verdict(Reason(raw["reason"]), raw["box"], raw["score"])
        # Several workers may have a request without its row before the first of them asks for one.
        if verdict.reason is Reason.NEEDS_ROW and not task.has_row and task.request.row is not None:
            self._row_rules.add(task.request.rule)
            self._send(worker, task)
            return []
        if verdict.failed and verdict.reason not in FINAL and task.tries + 1 < TRIES:
            return self._replace(worker, verdict)
        worker.task = None
        # A failure is not cached: the same request may succeed on a less busy node.
        is_cacheable = not verdict.failed and len(self._cache) < self._cache_size
        if is_cacheable and task.cache_key is not None:
            self._cache[task.cache_key] = verdict
        return [(task.key, verdict)]

    def _dispatch(self) -> None:
        """Send requests to idle workers: first retries, which only fresh workers get, then the waiting ones."""
        for worker in self._workers:
            if not worker.ready or worker.task is not None:
                continue
            if self._retries and worker.fresh:
                self._send(worker, self._retries.popleft())
            elif self._waiting:
                self._send(worker, self._waiting.popleft())

    def _ask_judge(self, key: Hashable, request: GradeRequest) -> None:
        """Send the question about a response to its judge."""
        if self._judges is None:
            raise RuleError(f"{request.rule}: there are no judges here; give reward.judges")
        verdict = self._judges.submit(key, request)
        if verdict is not None:
            self._ready.append((key, verdict))

    def _send(self, worker: GraderProcess, task: GraderTask) -> None:
        # A row may hold images: it is sent to a function that has asked for one, from then on with the request.
        worker.send(task, with_row=task.request.rule in self._row_rules)

    def _replace(self, worker: GraderProcess, verdict: Verdict) -> list[tuple[Hashable, Verdict]]:
        """Replace a worker that failed; return ``verdict`` on its task, unless the task is tried again.

        Raises:
            PoolError: workers do not start.
        """
        status = self._stop(worker)
        if status in (-signal.SIGPROF, -signal.SIGALRM):  # its own alarm came before this process looked
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
            self._retries.append(task)
            return []
        return [(task.key, verdict)]

    def _start(self, attempt: int = 0) -> None:
        worker = GraderProcess(self.timeout_s, self.memory_mib, attempt)
        assert worker.process.stdout is not None
        self._workers.append(worker)
        self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    def _stop(self, worker: GraderProcess) -> int:
        """End ``worker``; return its exit status."""
        assert worker.process.stdout is not None
        self._selector.unregister(worker.process.stdout)
        self._workers.remove(worker)
        return worker.kill()


def _join(verdicts: Iterable[tuple[Hashable, Verdict]]) -> Iterator[tuple[Hashable, Verdict]]:
    """Yield the verdicts with the caller's keys; those of a joint's rules as one, once all are there."""
    for key, verdict in verdicts:
        if not isinstance(key, _PartKey):
            yield key, verdict
            continue
        joint = key.joint
        joint.verdicts[key.rule] = verdict
        if len(joint.verdicts) == len(joint.weights):
            yield joint.key, combine(joint.weights, joint.verdicts)
