r"""Response, reference answer and options -> verdict.  Pure, deterministic, and without a clock of its own.

Only the last ``\boxed{}`` of the response counts.  Text and plain numbers are compared directly; what is left
goes to math-verify, whose LaTeX parser builds SymPy expressions and can run for ever on a hostile one.  A
caller that cannot trust its responses therefore goes through `ovr_megatron.rewards.pool.GraderPool`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, LatexNormalizationConfig, parse, verify

from ovr_megatron.rewards.choice import named_letter, right_option
from ovr_megatron.rewards.latex import MAX_ANSWER, clean, key, last_box
from ovr_megatron.rewards.quantity import number, same_number, split_unit
from ovr_megatron.rewards.verdict import RIGHT, GradeRequest, Reason, Verdict

# Units are cut off before, by a table that knows metres from variables; only LaTeX is parsed, since math-verify
# evaluates plain expressions as Python.
_LATEX = LatexExtractionConfig(
    boxed_match_priority=-1,
    normalization_config=LatexNormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True),
)

_ASSIGNMENT = re.compile(r"[A-Za-z](?:_\w|_\{\w+\}|\([a-z]\))? ?(?:=|\\in(?![a-zA-Z])) ?(?=.)")
_MATHEMATICAL = re.compile(r"[\d\\+\-*/^=<>|]")
_PROSE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{4,}")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{\w+\}")
_CONNECTIVE = re.compile(r",? ?(?<![a-zA-Z])(?:and|or)(?![a-zA-Z]) ?")
_BASE = re.compile(r"(\d+)_(\w|\{\w+\})")
_RELATION = re.compile(r"[<>]|\\(?:le|ge|in|ne|pm|mp|cup|cap|setminus|infty)(?![a-zA-Z])")
_JUXTAPOSED = re.compile(r"\d \d|\) ?\d")  # "(1) 20" is read as a mixed number by the parser
_BRACKETED = re.compile(r"(\(|\[|\\\{)(?=.*,)[^()\[\]]*(\)|\]|\\\})")


def grade(request: GradeRequest) -> Verdict:
    """Grade one response; never raises on any text."""
    box = last_box(request.response, request.thinking)
    if box is None:
        return Verdict(Reason.NO_BOX)
    if len(box) > MAX_ANSWER:
        return Verdict(Reason.LONG_BOX, box[:MAX_ANSWER])
    if not clean(box):
        return Verdict(Reason.EMPTY_BOX, box)
    right = right_option(request.answer, request.options) if request.options else None
    if right is not None:
        return Verdict(_among_options(box, request.options, right), box)
    return Verdict(_open_answer(box, request.answer), box)


def _among_options(box: str, options: Sequence[str], right: int) -> Reason:
    named = named_letter(clean(box), len(options))
    exact = [index for index, option in enumerate(options) if key(option) == key(box)]
    if named and not named.rest and (named.capital or not exact):
        return Reason.LETTER if named.index == right else Reason.OTHER_OPTION
    if exact:
        return _unique(right, exact)
    if named and named.rest:
        content = [index for index, option in enumerate(options) if same_plainly(option, named.rest) in RIGHT]
        if named.index not in content and named.strong and (named.hedged or content):
            return Reason.SEVERAL_OPTIONS if named.hedged else Reason.CONTRADICTION
        if named.index in content or named.strong:
            return Reason.LETTER if named.index == right else Reason.OTHER_OPTION
    if compare(options[right], box) not in RIGHT:
        return Reason.DIFFERENT
    return _unique(right, [index for index, option in enumerate(options) if compare(option, box) in RIGHT])


def _unique(right: int, matching: list[int]) -> Reason:
    if right not in matching:
        return Reason.OTHER_OPTION
    return Reason.CONTENT if len(matching) == 1 else Reason.SEVERAL_OPTIONS


def _open_answer(box: str, answer: str) -> Reason:
    reference = named_letter(clean(answer), 26)
    if reference and not reference.rest and reference.capital:
        named = named_letter(clean(box), 26)
        if named and named.strong and not named.hedged:
            return Reason.LETTER if named.index == reference.index else Reason.DIFFERENT
    return compare(answer, box)


@lru_cache(maxsize=8192)
def compare(reference: str, candidate: str) -> Reason:
    """Compare two values as written: `Reason.TEXT`, `NUMBER` or `MATH` where they are the same, else `DIFFERENT`."""
    reason = same_plainly(reference, candidate)
    if reason is not None:
        return reason
    left, right, scale = _values(reference, candidate)
    if scale != 1 or not _comparable(left, right):
        return Reason.DIFFERENT
    return Reason.MATH if _same_expression(left, right) else Reason.DIFFERENT


def same_plainly(reference: str, candidate: str) -> Reason | None:
    """`compare` as far as text and plain numbers go; None where only mathematics can tell."""
    if key(reference) == key(candidate):
        return Reason.TEXT if key(reference) else Reason.DIFFERENT
    left, right, scale = _values(reference, candidate)
    if _is_prose(left):
        return Reason.TEXT if key(reference).casefold() == key(candidate).casefold() else Reason.DIFFERENT
    if scale == 1 and left.replace(" ", "") == right.replace(" ", ""):
        return Reason.TEXT
    a, b = number(left.removesuffix("%").strip()), number(right.removesuffix("%").strip())
    if a is not None and b is not None:
        decimal = ("." in left) != ("." in right)
        percent = Fraction(100) if left.endswith("%") != right.endswith("%") else Fraction(1)
        smaller = (a / percent, b) if left.endswith("%") else (a, b / percent)
        same = same_number(a, b * scale, decimal) or (percent != 1 and same_number(*smaller, decimal))
        return Reason.NUMBER if same else Reason.DIFFERENT
    based = _BASE.fullmatch(left), _BASE.fullmatch(right)
    if any(based):
        digits = [match[1] if match else text for match, text in zip(based, (left, right), strict=True)]
        return Reason.NUMBER if digits[0] == digits[1] and not all(based) else Reason.DIFFERENT
    return None


def _values(reference: str, candidate: str) -> tuple[str, str, Fraction]:
    """Both values without unit, name and approximation, and the factor from the candidate's unit to the reference's."""
    left, unit = split_unit(clean(reference))
    right, other = split_unit(clean(candidate).partition("\\approx")[0].strip() or clean(candidate), attached=True)
    scale = Fraction(1)
    if unit and other and unit.dimensions == other.dimensions:
        scale = other.scale / unit.scale
    if "=" in right and "=" not in left and "," not in right:
        right = right.rpartition("=")[2].strip()
    names = {match.group() for text in (left, right) if (match := _ASSIGNMENT.match(text))}
    if len(names) == 1:
        left, right = _ASSIGNMENT.sub("", left, count=1), _ASSIGNMENT.sub("", right, count=1)
    return left, right, scale


def _is_prose(text: str) -> bool:
    return bool(_PROSE.search(_ENVIRONMENT.sub("", text))) or not _MATHEMATICAL.search(text)


def _comparable(left: str, right: str) -> bool:
    """Whether mathematics may decide: no words, no number beside a number, the same brackets, as many items."""
    if any(_is_prose(text) or _JUXTAPOSED.search(text) for text in (left, right)):
        return False
    brackets = _BRACKETED.fullmatch(left), _BRACKETED.fullmatch(right)
    if all(brackets) and brackets[0].groups() != brackets[1].groups():  # type: ignore[union-attr]
        return False
    related = _RELATION.search(left) or _RELATION.search(right)
    return bool(related) or _items(left) == _items(right)


def _items(text: str) -> int:
    return len(re.findall("[,;]", _CONNECTIVE.sub(",", text))) + 1


def _same_expression(left: str, right: str) -> bool:
    return bool(verify(_expression(left), _expression(right), timeout_seconds=None, allow_set_relation_comp=True))


@lru_cache(maxsize=8192)
def _expression(text: str) -> list[Any]:
    text = _CONNECTIVE.sub(", ", text.replace("%", ""))
    return parse(f"${text}$", [_LATEX], fallback_mode="no_fallback", parsing_timeout=None)
