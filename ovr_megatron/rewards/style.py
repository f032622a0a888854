r"""Rules for the form of a response, whatever it answers: its format, its language, and how much it repeats itself."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ovr_megatron.rewards.latex import BOX, END_OF_THOUGHT, START_OF_THOUGHT, clean, last_box
from ovr_megatron.rewards.verdict import GradeRequest, Reason, Verdict

if TYPE_CHECKING:  # a program that only grades loads neither images nor NumPy
    from ovr_megatron.data.schema import Row

LANGUAGES = {
    "en": re.compile(r"[A-Za-z\u00c0-\u024f]"),
    "zh": re.compile(r"[\u3400-\u9fff\uf900-\ufaff]"),
}
"""By language, the letters of its script."""
MAX_TEXT = 65_536
"""Last characters of a response in which letters and repetitions are counted."""
_LETTER = re.compile(r"[^\W\d_]")
_GREEK = re.compile(r"[\u0370-\u03ff]")  # formulas without marks
# Formulas, code and commands have Latin letters in any language.  Every alternative ends at the next mark of its own
# kind, so that a text of opening marks alone takes linear time.
_FORMULAS = re.compile(
    r"\$\$[^$]*\$\$|\$[^$\n]*\$|\\\((?:[^\n\\]|\\(?![()]))*+\\\)|```[^`]*```|`[^`\n]*`|\\[a-zA-Z]+|</?[a-z_]+>"
    r"|\b[A-Za-z]\b"
)
_CHINESE_SHARE = 0.2  # of the letters of a prompt that is Chinese: names and options are often Latin


def format_rule(request: GradeRequest) -> Verdict:
    r"""Give 1 to a response of one thought, which is closed once, and after it an answer with exactly one filled box.

    Where the prompt does not open the thought, the response begins with ``<think>``.
    """
    problem = _format_problem(request.response, request.thinking)
    return Verdict(Reason.SCORE, problem, 0.0 if problem else 1.0)


def _format_problem(response: str, thinking: bool) -> str | None:
    """Return what is wrong with the form of a response, None if nothing is."""
    text = response.lstrip()
    if not thinking:
        if not text.startswith(START_OF_THOUGHT):
            return f"no {START_OF_THOUGHT} at the beginning"
        text = text.removeprefix(START_OF_THOUGHT)
    thought, end, answer = text.partition(END_OF_THOUGHT)
    if not end:
        return f"no {END_OF_THOUGHT}"
    if START_OF_THOUGHT in text or END_OF_THOUGHT in answer:
        return "more than one thought"
    if not thought.strip():
        return "an empty thought"
    boxes = len(BOX.findall(answer))
    if boxes != 1:
        return f"{boxes} boxes after the thought"
    box = last_box(answer)
    if box is None or not clean(box):
        return "an empty or open box"
    return None


def language_rule(language: str, request: GradeRequest) -> Verdict:
    """Give the share of letters of ``language`` among all letters outside of formulas and code."""
    prose = _FORMULAS.sub(" ", request.response[-MAX_TEXT:])
    letters = [letter for letter in _LETTER.findall(prose) if not _GREEK.match(letter)]
    if not letters:
        return Verdict(Reason.UNREADABLE)
    script = LANGUAGES[language]
    share = sum(1 for letter in letters if script.match(letter)) / len(letters)
    return Verdict(Reason.SCORE, f"{share:.4f} {language}", share)


def language_of(row: Row) -> str:
    """Return the language of a row's last question: ``zh`` where a fifth of its letters are Chinese, else ``en``."""
    letters = _LETTER.findall(_FORMULAS.sub(" ", row.prompt[-1].text))
    chinese = sum(1 for letter in letters if LANGUAGES["zh"].match(letter))
    return "zh" if chinese > _CHINESE_SHARE * len(letters) else "en"


def repetition_rule(request: GradeRequest) -> Verdict:
    """Give 1 less the repeatness of the response (`ovr_megatron.rewards.repetition`)."""
    # Only graders import NumPy.
    from ovr_megatron.rewards.repetition import repeatness  # noqa: PLC0415

    share = repeatness(request.response[-MAX_TEXT:])
    return Verdict(Reason.SCORE, f"repeatness {share:.4f}", 1.0 - share)
