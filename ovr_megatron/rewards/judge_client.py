"""Ask judges from a pool of graders: a process of its own has the requests in flight (`judge_process`)."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ovr_megatron.rewards.judge_templates import open_templates
from ovr_megatron.rewards.rules import JUDGE
from ovr_megatron.rewards.verdict import GradeRequest, Reason, RuleError, Verdict
from ovr_megatron.runtime.environment import child_environment

if TYPE_CHECKING:  # a program that only grades does not load the settings
    from ovr_megatron.config import RewardJudgeConfig

STARTS = 2
"""Processes that try a question, one after the other, before it has no verdict."""
CLOSE_S = 40.0
"""Longest wait for the answers in flight when the pool is closed, more than the process itself takes."""
METRICS = ("requests", "tokens", "verdict", "refused", "malformed", "failed", "over_budget", "journal")
"""What is counted: attempts that ended, their tokens, replies by outcome, and those that were not asked for."""


@dataclass(frozen=True)
class Judges:
    """The judges of a run.

    Attributes:
        settings: Of each by name.
        folder: Of the journals of their answers.
        rank: Of this process among those that ask them.
        ranks: Number of these; concurrency and budgets are divided among them.
    """

    settings: Mapping[str, RewardJudgeConfig]
    folder: Path
    rank: int = 0
    ranks: int = 1


class JudgeClient:
    """Sends questions to the judges and collects their verdicts; its process starts with the first question."""

    def __init__(self, judges: Judges, selector: selectors.BaseSelector) -> None:
        """Read the templates; ``selector`` has the process's output, with this object as data, while it runs.

        Raises:
            RuleError: a template cannot be used.
        """
        self._judges = judges
        self._selector = selector
        self._templates = open_templates(judges.settings)
        self._process: subprocess.Popen[bytes] | None = None
        self._partial = b""  # output after the last complete line
        self._next_id = 0
        self._pending: dict[int, tuple[Hashable, str, bytes]] = {}  # by id: key, judge, and the line that was sent
        self._starts = 0  # since the last reply, with the process that sent it
        self._counts: Counter[str] = Counter()
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()  # that the process is sent
        self._stops_writing = threading.Event()

    @property
    def pending(self) -> int:
        """Return the number of questions without a verdict."""
        return len(self._pending)

    def submit(self, key: Hashable, request: GradeRequest) -> Verdict | None:
        """Send the question about a response; return the verdict where there is nothing to ask.

        Raises:
            RuleError: there is no such judge.
        """
        assert isinstance(request.rule, str)
        name = request.rule.removeprefix(JUDGE)
        template = self._templates.get(name)
        if template is None:
            raise RuleError(f"{request.rule}: there is no judge {name}; give reward.judges.{name}")
        field = "messages" if request.row is None else template.missing_field(request.row)
        if field is not None:
            self._counts["failed"] += 1
            return self._no_verdict(name, f"the row has no field {field}, which the template of the judge needs")
        question = {"id": self._next_id, "judge": name, "text": template.question(request)}
        line = json.dumps(question).encode() + b"\n"
        self._pending[self._next_id] = (key, name, line)
        self._next_id += 1
        if self._process is None:
            self._start()
        self._lines.put(line)
        return None

    def receive(self) -> list[tuple[Hashable, Verdict]]:
        """Return the (key, verdict) pairs that have come; where the process has ended, start another one once.

        Raises:
            RuleError: the settings of a judge cannot work.
        """
        assert self._process is not None and self._process.stdout is not None
        # os.read returns the bytes that are there; the file object would wait for a full buffer.
        chunk = os.read(self._process.stdout.fileno(), 1 << 20)
        if not chunk:
            return self._replace()
        *lines, self._partial = (self._partial + chunk).split(b"\n")
        verdicts = []
        for line in lines:
            reply = json.loads(line)
            if "error" in reply:
                raise RuleError(reply["error"])
            self._starts = 1
            key, name, _ = self._pending.pop(reply["id"])
            verdicts.append((key, self._verdict(name, reply)))
        return verdicts

    def take_counts(self) -> dict[str, float]:
        """Return what was counted since the last call, by the names in `METRICS`."""
        counts = {name: float(self._counts[name]) for name in METRICS}
        self._counts.clear()
        return counts

    def cancel(self) -> None:
        """Forget all questions; answers in flight are still kept in the journal."""
        if self._pending:
            self.close()
            self._pending.clear()
            self._starts = 0

    def close(self) -> None:
        """End the process, which keeps the answers in flight first."""
        if self._process is None:
            return
        process, self._process = self._process, None
        self._partial = b""
        assert process.stdout is not None
        self._selector.unregister(process.stdout)
        self._stops_writing.set()
        self._lines.put(b"")
        process.stdout.close()
        try:
            process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _start(self) -> None:
        self._starts += 1
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ovr_megatron.rewards.judge_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child_environment(os.environ),  # with the keys, which are in the environment alone
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._selector.register(self._process.stdout, selectors.EVENT_READ, self)
        self._lines = queue.SimpleQueue()
        self._stops_writing = threading.Event()
        writer_arguments = (self._process.stdin, self._lines, self._stops_writing)
        threading.Thread(target=_write_lines, args=writer_arguments, daemon=True).start()
        judges = self._judges
        settings = {name: asdict(judge) for name, judge in judges.settings.items()}
        job = {"folder": str(judges.folder), "rank": judges.rank, "ranks": judges.ranks, "judges": settings}
        self._lines.put(json.dumps(job).encode() + b"\n")

    def _replace(self) -> list[tuple[Hashable, Verdict]]:
        """Start another process and send it what is pending; give up where that has been done before."""
        self.close()
        if self._starts < STARTS:
            self._start()
            for _, _, line in list(self._pending.values()):
                self._lines.put(line)
            return []
        verdicts = []
        for key, name, _ in self._pending.values():
            self._counts["failed"] += 1
            verdicts.append((key, self._no_verdict(name, "the process that asks the judges ended")))
        self._pending.clear()
        self._starts = 0
        return verdicts

    def _verdict(self, name: str, reply: Mapping[str, Any]) -> Verdict:
        self._counts["requests"] += reply["requests"]
        self._counts["tokens"] += reply["tokens"]
        self._counts["journal"] += not reply["requests"] and reply["outcome"] in ("verdict", "refused", "malformed")
        self._counts[reply["outcome"]] += 1
        if reply["score"] is None:
            problem = ": ".join(filter(None, (reply["outcome"].replace("_", " "), reply["text"])))
            return self._no_verdict(name, problem)
        return Verdict(Reason.JUDGE, f"{name} {reply['score']:.4g}", reply["score"])

    def _no_verdict(self, name: str, problem: str) -> Verdict:
        return Verdict(Reason.NO_VERDICT, problem[:300], self._judges.settings[name].no_verdict)


def _write_lines(pipe: IO[bytes], lines: queue.SimpleQueue[bytes], stops: threading.Event) -> None:
    """Write ``lines`` until ``stops`` is set, then close the pipe.

    On a thread: the process reads when its own threads let it, for which the generation of responses does not wait.
    """
    # Where the process has died, `JudgeClient.receive` says so.
    with contextlib.suppress(BrokenPipeError):
        while not stops.is_set():
            pipe.write(lines.get())
            pipe.flush()
    with contextlib.suppress(BrokenPipeError):
        pipe.close()
