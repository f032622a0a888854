"""From graded responses to scores: greedy accuracy, avg@k, pass@k and maj@k, over all problems and by source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ovr_megatron.data.schema import Row, RowError
from ovr_megatron.evaluation.statistics import pass_at_k, wilson
from ovr_megatron.rewards.latex import last_box
from ovr_megatron.rewards.pool import GradeRequest, GraderPool
from ovr_megatron.rewards.verdict import FAILED

METRICS = ("auto", "boxed", "exact")
BOXED = {"boxed": "auto"}
"""Metrics by their rule where that has another name."""


@dataclass(frozen=True)
class Graded:
    r"""One response to problem number ``index``; ``sample`` is None for the greedy one.

    ``metric`` is ``boxed`` (the last ``\boxed{}`` is right), ``exact`` (the whole text is the reference), or the rule
    by which the box is right (`ovr_megatron.rewards.rules.rule`).
    ``response`` is None for a prompt over the length limit: it is not asked, and counts as wrong.
    ``vote`` is the answer that a sampled response votes for (`with_votes`).
    """

    index: int
    sample: int | None
    id: str
    source: str
    question: str
    reference: str
    options: tuple[str, ...]
    metric: str
    response: str | None = None
    tokens: int = 0
    stopped: bool = False
    correct: bool = False
    reason: str = ""
    vote: str | None = None

    @property
    def order(self) -> tuple[int, int]:
        """Sorts by problem, the greedy response first."""
        return self.index, -1 if self.sample is None else self.sample

    @property
    def failed(self) -> bool:
        """Whether no grader came to a verdict, so that the response counts as wrong though it may be right."""
        return self.reason in FAILED

    def to_json(self) -> dict[str, Any]:
        """The response as one line of ``SET.responses.jsonl``."""
        return asdict(self)


Official = Callable[[Sequence[Graded]], dict[str, float] | None]
"""From the greedy responses to a score, None where they are not all of a benchmark's that it needs."""


def reference_of(row: Row, metric: str) -> tuple[str, str]:
    """How a row is graded, ``boxed`` or ``exact``, and against what.

    ``auto`` takes ``exact`` for a row whose assistant text is itself the answer, such as a caption, else ``boxed``.

    Raises:
        RowError: the row has nothing to compare with.
    """
    if metric == "auto":
        metric = "exact" if row.response is not None and row.answer in (None, row.response) else "boxed"
    reference = row.answer
    if metric == "exact" and row.response is not None:
        reference = row.response
    if reference is None:
        raise RowError(row.where, "answer", "is missing", "add the final answer, or give --metric exact")
    return metric, reference


def score(responses: Sequence[Graded], official: Mapping[str, Official] | None = None) -> dict[str, Any]:
    """Scores of all ``responses``, and under ``sources`` those of each source.

    Args:
        responses: of every problem the greedy one, and as many samples of each.
        official: a benchmark's own scores by title, made of the greedy responses.

    Returns:
        ``problems`` and ``dropped`` (prompts over the limit); ``greedy`` with ``accuracy``, its 95 % interval
        ``low`` to ``high``, ``correct``, ``problems``, ``failed`` (no grader came to a verdict), mean
        ``tokens`` and the share that ``stopped``; ``sampled``, None without samples, with ``samples``, ``failed``,
        ``tokens``, ``stopped`` and, each an accuracy with its interval,
        ``average`` (avg@k over all samples), ``pass`` for each k, and ``majority`` (maj@k over all samples);
        ``official``, each an accuracy with its interval, those alone whose responses are all there.
    """
    greedy = [response for response in responses if response.sample is None]
    sources = sorted({response.source for response in responses})
    return {
        "problems": len(greedy),
        "dropped": sum(response.response is None for response in greedy),
        **_part(responses),
        "sources": {name: _part([r for r in responses if r.source == name]) for name in sources},
        "official": {title: found for title, formula in (official or {}).items() if (found := formula(greedy))},
    }


def _part(responses: Sequence[Graded]) -> dict[str, Any]:
    greedy = [response for response in responses if response.sample is None]
    drawn = [response for response in responses if response.sample is not None]
    correct = sum(response.correct for response in greedy)
    found = {**share(correct, len(greedy)), "correct": correct, "problems": len(greedy), **_counts(greedy)}
    return {"greedy": found, "sampled": _sampled(drawn) if drawn else None}


def _sampled(drawn: Sequence[Graded]) -> dict[str, Any]:
    problems: dict[int, list[Graded]] = {}
    for response in _voted(drawn):
        problems.setdefault(response.index, []).append(response)
    samples = len(drawn) // len(problems)
    right = [(len(group), sum(response.correct for response in group)) for group in problems.values()]
    passed = {str(k): share(sum(pass_at_k(*counts, k) for counts in right), len(problems)) for k in ks(samples)}
    majority = share(sum(map(majority_is_right, problems.values())), len(problems))
    return {"samples": samples, "average": passed["1"], "pass": passed, "majority": majority, **_counts(drawn)}


def majority_is_right(group: Sequence[Graded]) -> float:
    """Chance that the most frequent answer of a problem's responses is right (maj@k), a tie broken by lot.

    Right answers are one answer however they are written, and so are wrong ones that the grader counts as the same.
    A response without an answer has no vote.
    """
    votes: Counter[str | None] = Counter()
    for response in _voted(group):
        answer = response.vote or answer_of(response)
        if response.correct or answer:
            votes[None if response.correct else answer] += 1
    most = max(votes.values(), default=0)
    ahead = [answer for answer, count in votes.items() if count == most]
    return 1 / len(ahead) if None in ahead else 0.0


def with_votes(grader: GraderPool, responses: Sequence[Graded]) -> list[Graded]:
    """Return ``responses``, each sampled one that has an answer with its ``vote``.

    The vote is the answer as it was first written in a response to the problem that the problem's rule counts as the
    same.  An answer that no grader can compare is one of its own.
    """
    waiting: dict[int, list[str]] = {}  # by problem its distinct answers that have no vote yet
    problems: dict[int, Graded] = {}
    for r in responses:
        if r.sample is not None and (answer := answer_of(r)):
            problems[r.index] = r
            known = waiting.setdefault(r.index, [])
            if answer not in known:
                known.append(answer)
    votes: dict[tuple[int, str], str] = {}
    while waiting:
        votes |= {(index, answers[0]): answers[0] for index, answers in waiting.items()}
        pairs = [
            (index, answers[0], answer)
            for index, answers in waiting.items()
            for answer in answers[1:]
            if problems[index].metric != "exact"
        ]
        requests = [_comparison(problems[index], first, answer) for index, first, answer in pairs]
        verdicts = grader.grade(requests) if requests else []
        votes |= {
            (index, answer): first
            for (index, first, answer), verdict in zip(pairs, verdicts, strict=True)
            if verdict.correct
        }
        rest = {index: [a for a in answers if (index, a) not in votes] for index, answers in waiting.items()}
        waiting = {index: answers for index, answers in rest.items() if answers}
    return [replace(r, vote=votes.get((r.index, answer_of(r)))) if r.sample is not None else r for r in responses]


def _comparison(problem: Graded, first: str, answer: str) -> GradeRequest:
    """Ask whether ``answer`` would be right if ``first`` were."""
    return GradeRequest(f"\\boxed{{{answer}}}", first, problem.options, BOXED.get(problem.metric, problem.metric))


def _voted(responses: Sequence[Graded]) -> Sequence[Graded]:
    """Return ``responses`` with their votes; those of an older file, or made by hand, get them here."""
    texts = {(r.index, answer_of(r)) for r in responses if r.sample is not None and r.vote is None and not r.correct}
    texts = {text for text in texts if text[1]}
    if len(texts) == len({index for index, _ in texts}):  # no problem has two wrong answers to compare
        return responses
    with GraderPool(1) as grader:
        return with_votes(grader, responses)


def answer_of(response: Graded) -> str:
    """Return what a response gives as its answer: its box, or for ``exact`` its text; empty where it has none."""
    text = response.response or ""
    return text.strip() if response.metric == "exact" else last_box(text) or ""


def ks(samples: int) -> list[int]:
    """The k of pass@k that are reported: powers of two below ``samples``, and ``samples``."""
    return [2**power for power in range(samples.bit_length()) if 2**power < samples] + [samples]


def share(correct: float, total: int) -> dict[str, float]:
    """A share as ``accuracy`` with its 95 % interval ``low`` to ``high``."""
    found = wilson(min(correct, total), total)
    return {"accuracy": found.value, "low": found.low, "high": found.high}


def _counts(responses: Sequence[Graded]) -> dict[str, float | None]:
    """Count failed verdicts; give the mean length and the share that stopped of what was answered at all."""
    failed = sum(response.failed for response in responses)
    answered = [response for response in responses if response.response is not None]
    if not answered:
        return {"failed": failed, "tokens": None, "stopped": None}
    tokens = sum(response.tokens for response in answered) / len(answered)
    stopped = sum(response.stopped for response in answered) / len(answered)
    return {"failed": failed, "tokens": tokens, "stopped": stopped}
