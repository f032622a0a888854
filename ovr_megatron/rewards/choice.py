"""Multiple choice: the letter that an answer names, and whether an answer can be checked at all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ovr_megatron.rewards.latex import clean, key
from ovr_megatron.rewards.quantity import conversion, number, split_unit

MAX_REFERENCE = 300
"""Characters of a reference answer, cleaned; a longer one is prose."""
MAX_WORDS = 12

_PREFIX = r"(?:(?:the )?(?:correct |final )?(?:answer|option|choice)(?: is)?:? ?)?"
_LONE = re.compile(rf"{_PREFIX}[(\[]? ?([A-Za-z]) ?[)\]]?[.:]?", re.IGNORECASE)
_STRONG = re.compile(rf"{_PREFIX}(?:[(\[] ?([A-Z]) ?[)\]]|([A-Z]) ?[.):\]]) ?[.:]? ?(.+)")
_WEAK = re.compile(r"([A-Z]) ?[-,= ] ?(.+)")
_HEDGE = re.compile(r"(?:,|/|&|and\b|or\b|[(\[] ?[A-Z] ?[)\]]|[A-Z]$)|.*[(\[] ?[A-Z] ?[)\]]")

_PROOF = re.compile(r"\bproofs?\b|\bprove[ds]?\b|\bq\.?e\.?d\b|\\blacksquare|\\qed\b", re.IGNORECASE)
_VAGUE = re.compile(r"\banswers? (?:will |may )?var(?:y|ies)\b|\bsee (?:the )?(?:solution|figure|graph|above|below)\b")


@dataclass(frozen=True)
class Named:
    """An option named by its letter: ``index`` from 0, what was written after it, and how plainly it was named.

    ``strong`` is false where only the content can show that the letter was one ("A 5").
    """

    index: int
    rest: str = ""
    capital: bool = True
    strong: bool = True

    @property
    def hedged(self) -> bool:
        """Whether what follows names further letters ("(A) or (B)")."""
        return bool(self.rest) and _HEDGE.match(self.rest) is not None


def named_letter(text: str, count: int) -> Named | None:
    """The letter that cleaned ``text`` names among the first ``count``: "A", "(A)", "A.", "A: content"."""
    match = _LONE.fullmatch(text)
    if match:
        named = Named(ord(match[1].upper()) - ord("A"), capital=match[1].isupper())
    elif match := _STRONG.fullmatch(text):
        named = Named(ord(match[1] or match[2]) - ord("A"), match[3])
    elif match := _WEAK.fullmatch(text):
        named = Named(ord(match[1]) - ord("A"), match[2], strong=False)
    else:
        return None
    return named if named.index < count else None


def right_option(answer: str, options: Sequence[str]) -> int | None:
    """Index of the option that a reference answer means, by its letter or by its content; None for neither.

    A capital letter within range is a letter, even where another option consists of it.
    """
    named = named_letter(clean(answer), len(options))
    same = [index for index, option in enumerate(options) if key(option) == key(answer)]
    if named and named.strong and not named.hedged and (named.capital or not same):
        return named.index
    if not same:
        same = [index for index, option in enumerate(options) if _same_quantity(answer, option)]
    return same[0] if len(same) == 1 else None


def _same_quantity(answer: str, option: str) -> bool:
    """Whether both are numbers and equal, units included."""
    (left, unit), (right, other) = split_unit(clean(answer)), split_unit(clean(option))
    value, candidate, factor = number(left), number(right), conversion(unit, other)
    return value is not None and candidate is not None and factor is not None and value == candidate * factor


def verifiable(answer: str, options: Sequence[str] = ()) -> str | None:
    """Why ``answer`` has no form that a grader can verify ("it is empty", "it is a proof", ...), or None if it has."""
    if len(answer) > 4 * MAX_REFERENCE:
        return f"it has {len(answer)} characters and a final answer at most {MAX_REFERENCE}"
    text = clean(answer)
    if not text:
        return "it is empty"
    if options and right_option(answer, options) is None:
        return f"it is neither the letter nor the content of one of the {len(options)} options"
    if len(text) > MAX_REFERENCE:
        return f"it has {len(text)} characters and a final answer at most {MAX_REFERENCE}"
    if _PROOF.search(text):
        return "it is a proof"
    if _VAGUE.search(text.lower()):
        return "it does not name one value"
    words = len(re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}", text))
    if not options and words > MAX_WORDS:
        return f"it is prose of {words} words"
    return None
