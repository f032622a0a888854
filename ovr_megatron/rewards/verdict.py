"""What goes into a grader and what comes out; free of SymPy, so that a trainer can hold it cheaply."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

WALL_FACTOR = 12
"""How many times its limit of CPU time a verdict may take by the clock: on a busy node, or in a rule that sleeps."""


class Reason(StrEnum):
    """Why a verdict is what it is; `RIGHT` holds those that earn the reward."""

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
    OWN = "own rule"
    RAISED = "own rule raised an error"


RIGHT = frozenset({Reason.LETTER, Reason.CONTENT, Reason.TEXT, Reason.NUMBER, Reason.MATH})
FAILED = frozenset({Reason.TIMEOUT, Reason.CRASH, Reason.RAISED})
"""Reasons that say something of the grader and nothing of the response."""


@dataclass(frozen=True)
class GradeRequest:
    """A response, its reference answer (a letter, the content of an option, or a value) and the options, if any.

    ``rule`` is one of `ovr_megatron.rewards.rules.rule`.  ``thinking``: the prompt opened a thought, so that only what
    follows ``</think>`` is an answer.
    """

    response: str
    answer: str
    options: tuple[str, ...] = ()
    rule: str = "auto"
    thinking: bool = False


@dataclass(frozen=True)
class Verdict:
    """Outcome of one request; ``box`` is what was graded (None without a box).

    ``score`` is set by a rule of the user's alone.  Of a user's rule that raised an error,
    ``box`` says which.
    """

    reason: Reason
    box: str | None = None
    score: float | None = None

    @property
    def correct(self) -> bool:
        """Whether the reason is one of `RIGHT`, or the user's rule gave the whole reward."""
        return self.reason in RIGHT or self.score == 1.0

    @property
    def failed(self) -> bool:
        """Whether the grader came to no verdict; the reward of 0 then says nothing of the response."""
        return self.reason in FAILED

    @property
    def reward(self) -> float:
        """1.0 for a right answer, else 0.0 (recipe: no format reward), or the score of the user's rule."""
        return float(self.correct) if self.score is None else self.score
