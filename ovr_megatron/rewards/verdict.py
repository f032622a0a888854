"""Requests to graders and their verdicts; free of SymPy, so that a trainer can import them cheaply."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

WALL_FACTOR = 12
"""Limit of a verdict's wall time, in multiples of its limit of CPU time: a node may be busy, and a rule may sleep."""


class Reason(StrEnum):
    """The reason of a verdict; `RIGHT` has those that earn the reward."""

    LETTER = "letter of the right option"
    CONTENT = "content of the right option"
    TEXT = "same text"
    NUMBER = "same number"
    MATH = "equal by math-verify"
    NO_BOX = "no box"
    EMPTY_BOX = "empty box"
    LONG_BOX = "box too long"
    OTHER_OPTION = "another option"
    SEVERAL_OPTIONS = "several options"
    CONTRADICTION = "letter and content name different options"
    DIFFERENT = "different"
    TIMEOUT = "timeout"
    CRASH = "grader crashed"
    USER_RULE = "own rule"
    RAISED = "own rule raised an error"


RIGHT = frozenset({Reason.LETTER, Reason.CONTENT, Reason.TEXT, Reason.NUMBER, Reason.MATH})
FAILED = frozenset({Reason.TIMEOUT, Reason.CRASH, Reason.RAISED})
"""Reasons that concern the grader and say nothing of the response."""


@dataclass(frozen=True)
class GradeRequest:
    """A response to grade.

    Attributes:
        response: The text of the response.
        answer: The reference answer: a letter, the content of an option, or a value.
        options: The options of a multiple-choice problem.
        rule: The name of a rule, see `ovr_megatron.rewards.rules.rule`.
        thinking: Whether the prompt opened a thought, so that only text after ``</think>`` is an answer.
    """

    response: str
    answer: str
    options: tuple[str, ...] = ()
    rule: str = "auto"
    thinking: bool = False


@dataclass(frozen=True)
class Verdict:
    """The result of a request.

    Attributes:
        reason: The reason of the verdict.
        box: The graded content of the box, None without a box; the error if a user's rule raised one.
        score: The reward by a user's rule, None for other rules.
    """

    reason: Reason
    box: str | None = None
    score: float | None = None

    @property
    def correct(self) -> bool:
        """Return whether the reason is one of `RIGHT`, or the user's rule gave the full reward."""
        return self.reason in RIGHT or self.score == 1.0

    @property
    def failed(self) -> bool:
        """Return whether the grader came to no verdict; the reward of 0 then says nothing of the response."""
        return self.reason in FAILED

    @property
    def reward(self) -> float:
        """Return 1.0 for a right answer, else 0.0 (recipe: no format reward), or the score of the user's rule."""
        return float(self.correct) if self.score is None else self.score
