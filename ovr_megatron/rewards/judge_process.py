"""The process that asks the judges of a pool: JSON questions on stdin, JSON verdicts on stdout, one a line.

    python -m ovr_megatron.rewards.judge_process

Its first line says which judges there are, and where their answers are kept (`Job`).  A question is ``{"id", "judge",
"text"}``, its reply ``{"id", "outcome", "score", "text", "requests", "tokens"}``.  It is a process of its own, so that
hundreds of requests in flight take no time from the interpreter that generates.

Every answer is appended to ``NAME.RANK.jsonl`` before its reply is sent.  When stdin is closed, also because the parent
was killed, the requests in flight are waited for and kept, so that the next run does not ask them again.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, TextIO

from ovr_megatron.config import RewardJudgeConfig
from ovr_megatron.errors import UserError
from ovr_megatron.rewards.judge_templates import read_verdict
from ovr_megatron.runtime.chat_messages import Completion, Question
from ovr_megatron.runtime.endpoint import Endpoint
from ovr_megatron.runtime.environment import lower_priority
from ovr_megatron.runtime.journal import Journal
from ovr_megatron.runtime.kernel_lock import try_lock

DRAIN_S = 30.0
"""Longest wait for requests in flight at the end, and for a predecessor that waits for its own."""
_STORED_CHARACTERS = 300  # of the end of an answer, where the verdict is
_SORTED_EVERY = 4096  # answers after which the journal's index takes the new ones in

VERDICT = "verdict"
REFUSED = "refused"
MALFORMED = "malformed"
FAILED = "failed"
OVER_BUDGET = "over_budget"


@dataclass(frozen=True)
class Job:
    """What a process is told first.

    Attributes:
        folder: Of the journals.
        rank: Of this process among those that ask the judges of a run.
        ranks: Their number; concurrency and budgets are divided among them.
        judges: Settings of each judge by name.
    """

    folder: Path
    rank: int
    ranks: int
    judges: Mapping[str, RewardJudgeConfig]


class _JudgeAnswers:
    """The answers of one judge: those of the journals, and those in flight."""

    def __init__(self, name: str, config: RewardJudgeConfig, job: Job, replies: queue.Queue[dict[str, Any]]) -> None:
        self._config = config
        self._replies = replies
        self._lock = threading.Lock()
        self._journal = Journal(job.folder / f"{name}.{job.rank:05d}.jsonl")
        other_paths = [path for path in sorted(job.folder.glob(f"{name}.[0-9]*.jsonl")) if path != self._journal.path]
        self._earlier = [Journal(path, append=False) for path in other_paths]
        self._added: dict[int, dict[str, Any]] = {}  # answers that the journal's index does not have yet
        self._waiting: dict[int, list[int]] = {}  # by key of a question in flight, the ids that wait for it
        requests = 0
        tokens = 0
        for journal in (self._journal, *self._earlier):
            requests += len(journal)
            tokens += sum(int(entry.get("tokens", 0)) for entry in journal)
        self._problem = ""  # of an endpoint that refuses all questions
        shares = _Shares(job.rank, job.ranks)
        max_requests = shares.of_budget(config.max_requests, requests)
        max_tokens = shares.of_budget(config.max_total_tokens, tokens)
        self._is_spent = max_requests == 0 or max_tokens == 0
        settings = replace(
            config,
            concurrency=max(shares.of(config.concurrency), 1),
            max_requests=max_requests or 0,
            max_total_tokens=max_tokens or 0,
        )
        self.endpoint = Endpoint(settings, setting=f"reward.judges.{name}.{{}}", pause_s=config.max_backoff_s)

    def ask(self, request_id: int, text: str) -> None:
        """Reply to a question from the journal, or once its answer comes."""
        config = self._config
        key = question_key(config, text)
        with self._lock:
            entry = self._entry(key)
            if entry is None and key in self._waiting:
                self._waiting[key].append(request_id)
                return
            if entry is None:
                self._waiting[key] = [request_id]
        if entry is not None:
            self._reply(request_id, entry, requests=0)
            return
        if self._problem or self._is_spent:
            outcome = FAILED if self._problem else OVER_BUDGET
            self._finish(key, {"outcome": outcome, "text": self._problem}, 0)
            return
        question = Question(key, [{"role": "user", "content": text}], 0)
        self.endpoint.submit(question).add_done_callback(lambda future: self._receive(key, future))

    def _entry(self, key: int) -> dict[str, Any] | None:
        if key in self._added:
            return self._added[key]
        for journal in (self._journal, *self._earlier):
            # What an endpoint refused an earlier run is asked again: its settings may have been mended since.
            entry: dict[str, Any] | None = journal[key] if key in journal else None
            if entry is not None and entry["outcome"] != REFUSED:
                return entry
        return None

    def _receive(self, key: int, future: Future[Completion | None]) -> None:
        """Record the answer to a question, and reply to all that wait for it.  On a thread of the endpoint."""
        try:
            self._record(key, future)
        except (OSError, RuntimeError) as error:  # a full disk, or no further thread: the round must not wait for ever
            self._problem = f"{self._journal.path}: {error}"
            self._finish(key, {"outcome": FAILED, "text": self._problem}, 1)

    def _record(self, key: int, future: Future[Completion | None]) -> None:
        """Keep the answer to a question in the journal, and reply to all that wait for it.

        Raises:
            OSError: the disk does not take it.
            RuntimeError: no thread could be started for the request.
        """
        try:
            completion = future.result()
        except CancelledError:
            return
        except UserError as error:
            self._problem = str(error)
            completion = None
        if completion is None:
            outcome = FAILED if self._problem else OVER_BUDGET
            self._finish(key, {"outcome": outcome, "text": self._problem}, 0)
        elif not completion.final:
            self._finish(key, {"outcome": FAILED, "text": completion.error or ""}, 1)
        else:
            entry = entry_of(completion)
            with self._lock:
                self._journal.add(key, entry)
                self._added[key] = entry
                if len(self._added) >= _SORTED_EVERY:
                    self._journal.reopen()
                    self._added.clear()
            self._finish(key, entry, 1)

    def _finish(self, key: int, entry: Mapping[str, Any], requests: int) -> None:
        with self._lock:
            ids = self._waiting.pop(key, [])
        for index, request_id in enumerate(ids):
            self._reply(request_id, entry, requests if index == 0 else 0)

    def _reply(self, request_id: int, entry: Mapping[str, Any], requests: int) -> None:
        reply = {
            "id": request_id,
            "outcome": entry["outcome"],
            "score": entry.get("score"),
            "text": entry.get("text", ""),
            "requests": requests,
            "tokens": entry.get("tokens", 0) if requests else 0,
        }
        self._replies.put(reply)


@dataclass(frozen=True)
class _Shares:
    """The share of one of ``ranks`` processes."""

    rank: int
    ranks: int

    def of(self, amount: int) -> int:
        """Return the whole part of ``amount`` for this rank; the first ranks take what is left over."""
        return amount // self.ranks + (self.rank < amount % self.ranks)

    def of_budget(self, budget: int, spent: int) -> int | None:
        """Return this rank's share of what is left of a budget; None for one that is unlimited."""
        return self.of(max(budget - spent, 0)) if budget else None


def question_key(config: RewardJudgeConfig, text: str) -> int:
    """Return 64 bits that are equal for the same question to the same model with the same sampling."""
    fields = json.dumps([config.model, config.temperature, config.max_tokens, text])
    return int.from_bytes(blake2b(fields.encode(), digest_size=8).digest(), "big")


def entry_of(completion: Completion) -> dict[str, Any]:
    """Return what the journal keeps of a final completion: outcome, score, the end of its text, and its tokens."""
    if completion.error is not None:
        return {"outcome": REFUSED, "score": None, "text": completion.error, "tokens": completion.tokens}
    text = completion.text or ""
    score = read_verdict(text)
    outcome = MALFORMED if score is None else VERDICT
    return {"outcome": outcome, "score": score, "text": text[-_STORED_CHARACTERS:], "tokens": completion.tokens}


def _lock(folder: Path, rank: int) -> TextIO:
    """Wait until no other process writes this rank's journals: a killed run's keeps the answers in flight.

    Raises:
        UserError: it does not end.
    """
    file = (folder / f"{rank:05d}.lock").open("w")
    deadline = time.monotonic() + 2 * DRAIN_S
    while True:
        if try_lock(file):
            return file
        if time.monotonic() > deadline:
            raise UserError(f"another process asks judges with the journals in {folder}; wait for its end, or end it")
        time.sleep(0.05)


def _write_replies(replies: queue.Queue[dict[str, Any]], out: TextIO) -> None:
    """Write replies to the parent, and return once it is gone; later replies stay in the queue."""
    while True:
        reply = replies.get()
        try:
            out.write(json.dumps(reply) + "\n")
            # Together with those that are there: a reply a write would cost as much as the request.
            if replies.empty():
                out.flush()
        except OSError:
            return


def serve(lines: TextIO, out: TextIO) -> None:
    """Ask the judges for the questions in ``lines`` until they end, then keep what is in flight."""
    raw = json.loads(lines.readline())
    judges = {name: RewardJudgeConfig(**settings) for name, settings in raw["judges"].items()}
    job = Job(Path(raw["folder"]), raw["rank"], raw["ranks"], judges)
    job.folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(job.folder, job.rank)
    replies: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_write_replies, args=(replies, out), daemon=True).start()
    answers = {name: _JudgeAnswers(name, config, job, replies) for name, config in judges.items()}
    # This thread only reads: were it to write, it could wait for a parent that waits for it.
    for line in lines:
        question = json.loads(line)
        answers[question["judge"]].ask(question["id"], question["text"])
    deadline = time.monotonic() + DRAIN_S
    for judge in answers.values():
        judge.endpoint.drain(max(deadline - time.monotonic(), 0.0))
    lock.close()


def main() -> None:
    """Serve stdin until it is closed."""
    lower_priority()
    # Ctrl-C, and Slurm's warning to every process of a step, are for the trainer, which closes stdin when it stops.
    for interruption in (signal.SIGINT, signal.SIGTERM):
        signal.signal(interruption, signal.SIG_IGN)
    # Replies go to a copy of stdout, and stdout to stderr: no output of a library may look like a reply.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        serve(sys.stdin, out)
    except (UserError, OSError) as error:
        problem = str(error)
        if isinstance(error, OSError):
            problem = f"the answers of judges cannot be kept: {error}; make room there and run again"
        with contextlib.suppress(OSError):  # the parent may be gone
            out.write(json.dumps({"error": problem}) + "\n")
            out.flush()
    # Threads may still wait for an endpoint that does not answer.
    os._exit(0)


if __name__ == "__main__":
    main()
