"""Requests to graders and their verdicts; free of SymPy, so that a trainer can import them cheaply."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from ovr_megatron.errors import UserError

if TYPE_CHECKING:  # a program that only grades loads neither images nor NumPy
    from ovr_megatron.data.schema import ImageSize, Row

RewardRule = str | Mapping[str, float]
"""A rule by name, or several with the weight of each."""
WALL_FACTOR = 12
"""Limit of a verdict's wall time, in multiples of its limit of CPU time: a node may be busy, and a rule may sleep."""


class RuleError(UserError, ValueError):
    """A rule does not exist, cannot be imported or cannot work; the message has the remedy."""


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
    SCORE = "score"
    UNREADABLE = "no answer of this form"
    SEVERAL_ANSWERS = "several answers"
    WEIGHTED = "weighted rules"
    JUDGE = "judge"
    NO_VERDICT = "no verdict of the judge"
    BAD_REFERENCE = "unusable reference"
    NEEDS_ROW = "own rule needs the row"
    USER_RULE = "own rule"
    RAISED = "own rule raised an error"


RIGHT = frozenset({Reason.LETTER, Reason.CONTENT, Reason.TEXT, Reason.NUMBER, Reason.MATH})
FINAL = frozenset({Reason.BAD_REFERENCE, Reason.NEEDS_ROW})
"""Failures that another grader would repeat."""
UNKNOWN = frozenset({Reason.RAISED, Reason.BAD_REFERENCE, Reason.NEEDS_ROW, Reason.NO_VERDICT})
"""Reasons that leave the reward unknown."""
FAILED = frozenset({Reason.TIMEOUT, Reason.CRASH}) | UNKNOWN
"""Reasons that concern the grader and say nothing of the response."""


@dataclass(frozen=True)
class GradeRequest:
    """A response to grade.

    Attributes:
        response: The text of the response.
        answer: The reference answer: a letter, the content of an option, or a value.
        options: The options of a multiple-choice problem.
        rule: The name of a rule, see `ovr_megatron.rewards.rules.rule`; or several names, each with its weight.
        thinking: Whether the prompt opened a thought, so that only text after ``</think>`` is an answer.
        row: The row that the response answers, for own functions, judges and rules that read more of it than the
            answer; None where there is none.
        image: Size of the row's only image, for rules that scale coordinates; None where no rule needs it.
    """

    response: str
    answer: str
    options: tuple[str, ...] = ()
    rule: RewardRule = "auto"
    thinking: bool = False
    row: Row | None = field(default=None, compare=False)
    image: ImageSize | None = None


@dataclass(frozen=True)
class Verdict:
    """The result of a request.

    Attributes:
        reason: The reason of the verdict.
        box: The graded content of the box, None without a box; the error if a user's rule raised one; of weighted
            rules the reward and reason of each.
        score: The reward by a rule that gives one between 0 and 1, None for other rules.
    """

    reason: Reason
    box: str | None = None
    score: float | None = None

    @property
    def correct(self) -> bool:
        """Return whether the reason is one of `RIGHT`, or the score is the full reward."""
        return self.reason in RIGHT or self.score == 1.0

    @property
    def failed(self) -> bool:
        """Return whether the grader came to no verdict; the reward of 0 then says nothing of the response."""
        return self.reason in FAILED

    @property
    def reward(self) -> float:
        """Return 1.0 for a right answer, else 0.0 (recipe: no format reward), or the score of the rule."""
        return float(self.correct) if self.score is None else self.score
