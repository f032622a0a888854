"""Score graded responses: greedy accuracy, avg@k, pass@k and maj@k, over all problems and by source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypedDict

from ovr_megatron.data.schema import Row, RowError
from ovr_megatron.evaluation.statistics import pass_at_k, wilson
from ovr_megatron.rewards.latex import last_box
from ovr_megatron.rewards.pool import GradeRequest, GraderPool
from ovr_megatron.rewards.verdict import FAILED


@dataclass(frozen=True)
class GradedResponse:
    r"""A response to a problem, with its verdict.

    Attributes:
        index: Index of the problem in its set.
        sample: Index of the sample, None for the greedy response.
        id: Id of the problem.
        source: Source of the problem.
        question: Text of the prompt.
        reference: What the response is compared with.
        options: Options of a multiple-choice problem.
        metric: ``boxed`` (the last ``\boxed{}`` is right), ``exact`` (the response is the reference), or the rule by
            which the box is right (`ovr_megatron.rewards.rules.rule`).
        response: None for a prompt over the length limit, which gets no response and counts as wrong.
        tokens: Length of the response.
        stopped: Whether it ended before the limit of its length.
        correct: Whether it is right.
        reason: Reason of the verdict.
        vote: The answer that a sampled response votes for (`add_votes`).
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
        """Return a sort key: by problem, the greedy response first."""
        return self.index, -1 if self.sample is None else self.sample

    @property
    def failed(self) -> bool:
        """Return whether no grader came to a verdict: the response counts as wrong, though it may be right."""
        return self.reason in FAILED

    def to_json(self) -> Mapping[str, Any]:
        """Return the response as the object of its line in ``SET.responses.jsonl``."""
        return asdict(self)


class Accuracy(TypedDict):
    """A share of right responses, with its 95 % interval ``low`` to ``high``."""

    accuracy: float
    low: float
    high: float


class ResponseCounts(TypedDict):
    """Responses that no grader came to a verdict on, mean tokens, and the share that ended before the limit."""

    failed: int
    tokens: float | None
    stopped: float | None


class GreedyScores(Accuracy, ResponseCounts):
    """Scores of the greedy responses."""

    correct: int
    problems: int


# Not a class, because a field is called ``pass``: pass@k by k.
SampledScores = TypedDict(
    "SampledScores",
    {
        "samples": int,
        "average": Accuracy,
        "pass": dict[str, Accuracy],
        "majority": Accuracy,
        "failed": int,
        "tokens": float | None,
        "stopped": float | None,
    },
)


class SourceScores(TypedDict):
    """Scores of the problems of one source; ``sampled`` is None without samples."""

    greedy: GreedyScores
    sampled: SampledScores | None


class EvaluationScores(SourceScores):
    """Scores of all problems; ``dropped`` counts prompts over the limit, ``official`` are a benchmark's own scores."""

    problems: int
    dropped: int
    sources: dict[str, SourceScores]
    official: dict[str, Accuracy]


class EvaluationResult(EvaluationScores):
    """Content of ``NAME.json``, see `ovr_megatron.evaluation.evaluator.evaluate`."""

    set: str
    model: str
    source: str
    benchmark: str | None
    settings: Mapping[str, Any]
    rules: dict[str, str]
    prompt: str | None
    seconds: float
    tokens_per_second: float
    mark: str | None


METRICS = ("auto", "boxed", "exact")
"""Metrics that are no rule of rewards."""
OfficialScore = Callable[[Sequence[GradedResponse]], Accuracy | None]
"""Computes a benchmark's own score from the greedy responses; None if some of those that it needs are missing."""


def rule_of(metric: str) -> str:
    """Return the rule that grades the box of a response (`ovr_megatron.rewards.rules.rule`)."""
    return "auto" if metric == "boxed" else metric


def reference_of(row: Row, metric: str) -> tuple[str, str]:
    """Return how a row is graded, ``boxed`` or ``exact``, and its reference.

    ``auto`` stands for ``exact`` where the row's assistant text is itself the answer, as a caption, else ``boxed``.

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


def score(responses: Sequence[GradedResponse], official: Mapping[str, OfficialScore] | None = None) -> EvaluationScores:
    """Compute the scores of all ``responses``, and under ``sources`` those of each source.

    Args:
        responses: The greedy response of every problem, and equally many samples of each.
        official: A benchmark's own scores by title.

    Returns:
        ``problems`` and ``dropped`` (prompts over the limit); ``greedy`` with ``accuracy``, its 95 % interval
        ``low`` to ``high``, ``correct``, ``problems``, ``failed`` (no grader came to a verdict), mean
        ``tokens`` and the share that ``stopped``; ``sampled``, None without samples, with ``samples``, ``failed``,
        ``tokens``, ``stopped`` and, each an accuracy with its interval,
        ``average`` (avg@k over all samples), ``pass`` for each k, and ``majority`` (maj@k over all samples);
        ``official`` with the benchmark's own scores whose responses are complete, each an accuracy with its interval.
    """
    greedy = [response for response in responses if response.sample is None]
    by_source: dict[str, list[GradedResponse]] = {}
    for response in responses:
        by_source.setdefault(response.source, []).append(response)
    official_scores: dict[str, Accuracy] = {}
    for title, official_score in (official or {}).items():
        if value := official_score(greedy):
            official_scores[title] = value
    return {
        "problems": len(greedy),
        "dropped": sum(response.response is None for response in greedy),
        **_greedy_and_sampled(responses),
        "sources": {source: _greedy_and_sampled(by_source[source]) for source in sorted(by_source)},
        "official": official_scores,
    }


def _greedy_and_sampled(responses: Sequence[GradedResponse]) -> SourceScores:
    greedy = [response for response in responses if response.sample is None]
    sampled = [response for response in responses if response.sample is not None]
    correct = sum(response.correct for response in greedy)
    greedy_scores: GreedyScores = {
        **accuracy_interval(correct, len(greedy)),
        "correct": correct,
        "problems": len(greedy),
        **_counts(greedy),
    }
    sampled_scores = _sampled_scores(sampled) if sampled else None
    return {"greedy": greedy_scores, "sampled": sampled_scores}


def _sampled_scores(responses: Sequence[GradedResponse]) -> SampledScores:
    groups: dict[int, list[GradedResponse]] = {}  # by problem
    for response in _ensure_votes(responses):
        groups.setdefault(response.index, []).append(response)
    samples = len(responses) // len(groups)
    passes = {str(k): _pass_accuracy(groups.values(), k) for k in k_values(samples)}
    majority_chances = [majority_is_right(group) for group in groups.values()]
    return {
        "samples": samples,
        "average": passes["1"],  # pass@1 averaged over the problems is the mean over all samples, avg@k
        "pass": passes,
        "majority": accuracy_interval(sum(majority_chances), len(groups)),
        **_counts(responses),
    }


def _pass_accuracy(groups: Collection[Sequence[GradedResponse]], k: int) -> Accuracy:
    """Return pass@k over problems, from the samples of each."""
    chances = []
    for group in groups:
        correct = sum(response.correct for response in group)
        chances.append(pass_at_k(len(group), correct, k))
    return accuracy_interval(sum(chances), len(groups))


def majority_is_right(group: Sequence[GradedResponse]) -> float:
    """Return the chance that the most frequent answer of a problem's responses is right (maj@k); ties are random.

    All right answers are one answer, however they are written, and so are wrong ones that the grader counts as the
    same.  A response without an answer has no vote.
    """
    right_answer = None  # stands for all right answers; a wrong one stands for itself
    votes: Counter[str | None] = Counter()
    for response in _ensure_votes(group):
        answer = response.vote or answer_of(response)
        if response.correct:
            votes[right_answer] += 1
        elif answer:
            votes[answer] += 1
    highest = max(votes.values(), default=0)  # 0: no response has an answer
    winners = [answer for answer, count in votes.items() if count == highest]
    return 1 / len(winners) if right_answer in winners else 0.0


def add_votes(grader: GraderPool, responses: Sequence[GradedResponse]) -> list[GradedResponse]:
    """Return ``responses`` with the ``vote`` of each sampled response that has an answer.

    The vote is the first answer to the problem that the problem's rule counts as the same as the response's.  An answer
    that no grader can compare votes for itself.
    """
    remaining: dict[int, list[str]] = {}  # by problem its distinct answers without a vote
    problems: dict[int, GradedResponse] = {}  # a response to each problem, for its rule and options
    for response in responses:
        if response.sample is not None and (answer := answer_of(response)):
            problems[response.index] = response
            answers = remaining.setdefault(response.index, [])
            if answer not in answers:
                answers.append(answer)

    votes: dict[tuple[int, str], str] = {}  # by problem and answer
    while remaining:
        votes |= _vote_for_first(grader, problems, remaining)
        next_remaining: dict[int, list[str]] = {}
        for index, answers in remaining.items():
            unequal_answers = [answer for answer in answers if (index, answer) not in votes]
            if unequal_answers:
                next_remaining[index] = unequal_answers
        remaining = next_remaining
    return [_with_vote(response, votes) for response in responses]


def _vote_for_first(
    grader: GraderPool,
    problems: Mapping[int, GradedResponse],
    remaining: Mapping[int, Sequence[str]],
) -> dict[tuple[int, str], str]:
    """Return the votes, by problem and answer, of each problem's first answer and those that count as the same."""
    votes: dict[tuple[int, str], str] = {}
    compared: list[tuple[int, str]] = []
    requests: list[GradeRequest] = []
    for index, (first, *other_answers) in remaining.items():
        votes[index, first] = first
        if problems[index].metric == "exact":  # different texts are different answers
            continue
        for answer in other_answers:
            compared.append((index, answer))
            requests.append(_comparison(problems[index], first, answer))
    # One call for all problems, so that all workers of the pool have work.
    verdicts = grader.grade(requests) if requests else []
    for (index, answer), verdict in zip(compared, verdicts, strict=True):
        if verdict.correct:
            votes[index, answer] = remaining[index][0]
    return votes


def _with_vote(response: GradedResponse, votes: Mapping[tuple[int, str], str]) -> GradedResponse:
    if response.sample is None:
        return response
    return replace(response, vote=votes.get((response.index, answer_of(response))))


def _comparison(problem: GradedResponse, first: str, answer: str) -> GradeRequest:
    """Return the request whether ``answer`` would be right if ``first`` were the reference."""
    return GradeRequest(f"\\boxed{{{answer}}}", first, problem.options, rule_of(problem.metric))


def _ensure_votes(responses: Sequence[GradedResponse]) -> Sequence[GradedResponse]:
    """Return ``responses`` with votes; add those that responses of an older file, or of other code, lack."""
    answers: set[tuple[int, str]] = set()  # wrong answers without a vote, by problem
    for response in responses:
        # Right responses are one answer in any case.
        if response.sample is not None and response.vote is None and not response.correct:
            if answer := answer_of(response):
                answers.add((response.index, answer))
    has_comparisons = len(answers) > len({index for index, _ in answers})
    if not has_comparisons:  # no problem has two different wrong answers, so grader processes need not start
        return responses
    with GraderPool(1) as grader:
        return add_votes(grader, responses)


def answer_of(response: GradedResponse) -> str:
    """Return the answer of a response, its last box or for ``exact`` its text; empty if it has none."""
    text = response.response or ""  # None for a prompt over the limit
    return text.strip() if response.metric == "exact" else last_box(text) or ""


def k_values(samples: int) -> list[int]:
    """Return the k for which pass@k is reported: powers of two below ``samples``, and ``samples``."""
    powers = [2**exponent for exponent in range(samples.bit_length())]
    return [power for power in powers if power < samples] + [samples]


def accuracy_interval(correct: float, total: int) -> Accuracy:
    """Return the share ``correct / total`` as ``accuracy``, with its 95 % interval ``low`` to ``high``."""
    share = wilson(min(correct, total), total)
    return {"accuracy": share.value, "low": share.low, "high": share.high}


def format_accuracy(scores: Accuracy) -> str:
    """Return an accuracy and its interval in percent, as text."""
    accuracy = 100 * scores["accuracy"]
    low = 100 * scores["low"]
    high = 100 * scores["high"]
    return f"{accuracy:.1f} % ({low:.1f} to {high:.1f})"


def _counts(responses: Sequence[GradedResponse]) -> ResponseCounts:
    """Count failed verdicts; compute the mean length and the share that stopped, without dropped prompts."""
    failed = sum(response.failed for response in responses)
    answered = [response for response in responses if response.response is not None]
    if not answered:
        return {"failed": failed, "tokens": None, "stopped": None}
    tokens = sum(response.tokens for response in answered)
    stopped = sum(response.stopped for response in answered)
    return {
        "failed": failed,
        "tokens": tokens / len(answered),
        "stopped": stopped / len(answered),
    }
