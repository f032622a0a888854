"""Read the letter of a multiple-choice answer, and check whether an answer can be verified at all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ovr_megatron.rewards.latex import clean, key
from ovr_megatron.rewards.quantity import conversion, number, split_unit

MAX_REFERENCE = 300
"""Characters of a reference answer, cleaned; a longer one is prose."""
MAX_WORDS = 12
"""Words of a reference answer without options; a longer one is prose."""

# Letters: alone ("A", "(a)", "Answer: B."), beside content after a bracket or dot ("(A) 5", "A: 5"), and beside content
# that may as well belong to it ("A 5", "A = 5").
_PREFIX = r"(?:(?:the )?(?:correct |final )?(?:answer|option|choice)(?: is)?:? ?)?"
_LONE = re.compile(rf"{_PREFIX}[(\[]? ?([A-Za-z]) ?[)\]]?[.:]?", re.IGNORECASE)
_STRONG = re.compile(rf"{_PREFIX}(?:[(\[] ?([A-Z]) ?[)\]]|([A-Z]) ?[.):\]]) ?[.:]? ?(.+)")
_WEAK = re.compile(r"([A-Z]) ?[-,= ] ?(.+)")
# A rest that goes on with further letters: ", B", "or (B)", "5 (B)".
_HEDGE = re.compile(r"(?:,|/|&|and\b|or\b|[(\[] ?[A-Z] ?[)\]]|[A-Z]$)|.*[(\[] ?[A-Z] ?[)\]]")

_PROOF = re.compile(r"\bproofs?\b|\bprove[ds]?\b|\bq\.?e\.?d\b|\\blacksquare|\\qed\b", re.IGNORECASE)
_VAGUE = re.compile(r"\banswers? (?:will |may )?var(?:y|ies)\b|\bsee (?:the )?(?:solution|figure|graph|above|below)\b")


@dataclass(frozen=True)
class NamedOption:
    """An option that a text names by its letter.

    Attributes:
        index: Index of the option, from 0.
        rest: Text after the letter.
        capital: Whether the letter is a capital.
        strong: False if only the content can show that the letter names an option ("A 5").
    """

    index: int
    rest: str = ""
    capital: bool = True
    strong: bool = True

    @property
    def hedged(self) -> bool:
        """Return whether the rest names further letters ("(A) or (B)")."""
        return bool(self.rest) and _HEDGE.match(self.rest) is not None


def named_letter(text: str, count: int) -> NamedOption | None:
    """Return the option that cleaned ``text`` names, of the first ``count``: "A", "(A)", "A.", "A: content"."""
    # From the strictest form to the loosest: "(A)." has the form of a letter beside content, too.
    if match := _LONE.fullmatch(text):
        letter = match[1]
        option = NamedOption(_index(letter.upper()), capital=letter.isupper())
    elif match := _STRONG.fullmatch(text):
        option = NamedOption(_index(match[1] or match[2]), match[3])
    elif match := _WEAK.fullmatch(text):
        option = NamedOption(_index(match[1]), match[2], strong=False)
    else:
        return None
    return option if option.index < count else None


def _index(capital: str) -> int:
    return ord(capital) - ord("A")


def right_option(answer: str, options: Sequence[str]) -> int | None:
    """Return the index of the option that a reference answer means, by letter or content; None if it means none.

    A capital letter within range is a letter, even if another option consists of it.
    """
    letter = named_letter(clean(answer), len(options))
    answer_key = key(answer)
    # By text first: equal texts decide even where an option is no number.
    matches = [index for index, option in enumerate(options) if key(option) == answer_key]
    if letter and letter.strong and not letter.hedged and (letter.capital or not matches):
        return letter.index
    if not matches:
        matches = [index for index, option in enumerate(options) if _same_quantity(answer, option)]
    # Several equal options: none of them is meant more than the others.
    return matches[0] if len(matches) == 1 else None


def _same_quantity(answer: str, option: str) -> bool:
    """Return whether both are numbers and equal, units included."""
    answer_text, answer_unit = split_unit(clean(answer))
    option_text, option_unit = split_unit(clean(option))
    answer_value = number(answer_text)
    option_value = number(option_text)
    factor = conversion(answer_unit, option_unit)
    if answer_value is None or option_value is None or factor is None:
        return False
    return answer_value == option_value * factor


def verifiable(answer: str, options: Sequence[str] = ()) -> str | None:
    """Return why no grader can verify ``answer`` ("it is empty", "it is a proof", ...), or None if one can."""
    # Before `clean`, which costs time; cleaning hardly shortens a text to a quarter.
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
    # Commands of LaTeX and single letters are no words.
    words = re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}", text)
    count = len(words)
    if not options and count > MAX_WORDS:
        return f"it is prose of {count} words"
    return None
