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
from ovr_megatron.rewards.latex import MAX_ANSWER, clean, joined, key, last_box, squeeze
from ovr_megatron.rewards.precision import apart, evaluated
from ovr_megatron.rewards.quantity import conversion, number, same_number, split_unit
from ovr_megatron.rewards.verdict import RIGHT, GradeRequest, Reason, Verdict

# Units are cut off before, by a table that knows metres from variables; only LaTeX is parsed, since math-verify
# evaluates plain expressions as Python.
_LATEX = LatexExtractionConfig(
    boxed_match_priority=-1,
    normalization_config=LatexNormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True),
)

_ASSIGNMENT = re.compile(r"[A-Za-z](?:_\w|_\{\w+\}|\([a-z]\))? ?(?:=|\\in(?![a-zA-Z])) ?(?=.)")
_TUPLE_NAMES = re.compile(r"\( ?[A-Za-z](?: ?, ?[A-Za-z])+ ?\) ?= ?(?=\()")
_GREEK = (
    r"\\(?:alpha|beta|gamma|delta|varepsilon|epsilon|theta|lambda|mu|rho|sigma|tau|varphi|phi|omega|angle)(?![a-zA-Z])"
)
_NAME = re.compile(rf"(?:[A-Za-z]|{_GREEK} ?)(?:_\w|_\{{\w+\}}|\([a-z]\))?")
_PAIR = re.compile(r"([A-Za-z]) ?= ?([^=<>]+)")
_SYMBOL = re.compile(rf"(?<![\\a-zA-Z])[a-zA-Z]|{_GREEK}")
_MATHEMATICAL = re.compile(r"[\d\\+\-*/^=<>|]")
_PROSE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{4,}")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{\w+\}")
_CONNECTIVE = re.compile(r",? ?(?<![a-zA-Z])(?:and|or)(?![a-zA-Z]) ?")
_ALTERNATIVE = re.compile(r"(?<![a-zA-Z])or(?![a-zA-Z])")
_BASE = re.compile(r"(\d+)_(\w|\{\w+\})")
_RELATION = re.compile(r"[<>]|\\(?:le|ge|in|ne|pm|mp|cup|cap|setminus|infty)(?![a-zA-Z])")
# "(1) 20" and "{1}{20}" are read as mixed numbers by the parser.
_JUXTAPOSED = re.compile(r"(?<!\\log_)\d \d|\) ?\d|(?<![\\a-zA-Z}\]^_])\{[^{}]*\} ?\{|\d ?\{ ?\d")
_DIGITS_AND_COMMA = re.compile(r"(?<=\d),(?=\d)")  # to the parser 144,169 is one number
ROUNDING = Fraction(1, 20)
r"""Share by which an approximation that stands beside a value may differ from it: \pi \approx 3."""
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
    values = _values(reference, candidate)
    if values is None:
        return Reason.DIFFERENT
    left, right, scale = values
    if scale != 1 or not _comparable(left, right):
        return Reason.DIFFERENT
    return Reason.MATH if _same_expression(left, right) else Reason.DIFFERENT


def same_plainly(reference: str, candidate: str) -> Reason | None:
    """`compare` as far as text and plain numbers go; None where only mathematics can tell."""
    if key(reference) == key(candidate):
        return Reason.TEXT if key(reference) else Reason.DIFFERENT
    values = _values(reference, candidate)
    if values is None:
        return Reason.DIFFERENT
    left, right, scale = values
    if _is_prose(left):
        return Reason.TEXT if key(reference).casefold() == key(candidate).casefold() else Reason.DIFFERENT
    if scale == 1 and squeeze(left) == squeeze(right):
        return Reason.TEXT
    a, b = number(left.removesuffix("%").strip()), number(right.removesuffix("%").strip())
    if a is not None and b is not None:
        decimal = _is_decimal(left) != _is_decimal(right)
        signs = left.endswith("%"), right.endswith("%")
        # A sign may be left out or added where the question asks for percent, but 0.5 is not 0.5 %.
        same = same_number(a, b * scale, decimal) if signs[0] == signs[1] or abs(a) >= 1 else False
        if not same and signs[0] != signs[1]:
            same = same_number(a / 100 if signs[0] else a, b / 100 if signs[1] else b, decimal)
        return Reason.NUMBER if same else Reason.DIFFERENT
    based = _BASE.fullmatch(left), _BASE.fullmatch(right)
    if any(based):
        digits = [match[1] if match else text for match, text in zip(based, (left, right), strict=True)]
        return Reason.NUMBER if digits[0] == digits[1] and not all(based) else Reason.DIFFERENT
    return None


def _is_decimal(text: str) -> bool:
    return "." in text and "\\overline" not in text


def _values(reference: str, candidate: str) -> tuple[str, str, Fraction] | None:
    """Both values without unit, name and approximation, and the factor from the candidate's unit to the reference's.

    None where the units measure different things, or where the candidate states several values.
    """
    exact, _ = _approximated(clean(reference))
    stated = _stated(clean(candidate), "=" in exact)
    if stated is None:
        return None
    left, unit = split_unit(exact)
    right, other = split_unit(stated, attached=True)
    scale = conversion(unit, other)
    if scale is None:
        return None
    if number(left) is not None:
        right = joined(right)
    tuples = _as_tuples(left, right)
    if tuples is None:
        return None
    left, right = tuples
    names = [_ASSIGNMENT.match(text) or _TUPLE_NAMES.match(text) for text in (left, right)]
    spelled = {match.group() for match in names if match}
    # Of "y = 2x + 1" and "2x - y + 1 = 0" both are equations, of "y = 2x + 1" and "2x + 1" one has the name alone.
    equations = [not match and "=" in text for match, text in zip(names, (left, right), strict=True)]
    if len(spelled) == 1 and not any(equations):
        left, right = (
            text[match.end() :] if match and _in_order(match.group()) else text
            for match, text in zip(names, (left, right), strict=True)
        )
    return left, right, scale


def _approximated(text: str) -> tuple[str, list[str]]:
    """What stands before the first sign of approximation, or after it where that is nothing or a name, and the rest."""
    first, *rest = (part.strip() for part in text.split("\\approx"))
    if rest and (not first or _NAME.fullmatch(first)):
        first, *rest = rest
    return first, rest


def _stated(text: str, equation: bool) -> str | None:
    r"""The value that a chain like "x = 2\sqrt{5} \approx 4.47" states; None where its members disagree.

    Where the reference is an equation, "=" belongs to the value.
    """
    value, approximations = _approximated(text)
    if "=" in value and not equation and "," not in value and not _CONNECTIVE.search(value):
        *before, value = (part.strip() for part in value.split("="))
        numbers = (part for part in before if part and not _SYMBOL.search(split_unit(part, attached=True)[0]))
        if not all(compare(part, value) in RIGHT for part in numbers):
            return None
    if not all(_near(value, other) for other in approximations):
        return None
    return value


def _near(value: str, approximation: str) -> bool:
    """Whether both are numbers and the one may be a rounding of the other, as percent, too."""
    sides = [split_unit(text, attached=True)[0].removesuffix("%").strip() for text in (value, approximation)]
    if not all(sides) or any(_is_prose(side) or _JUXTAPOSED.search(side) for side in sides):
        return False
    parsed = [expression[0] if (expression := _expression(side)) else None for side in sides]
    exact, rounded = (evaluated(item) for item in parsed)
    if exact is None or rounded is None:
        return False
    return any(abs(exact * factor - rounded) <= ROUNDING * abs(rounded) for factor in (1, 100))


def _as_tuples(left: str, right: str) -> tuple[str, str] | None:
    """Write "x = 3, y = 4" as "(3, 4)", by the order of the names, where the other side is a tuple.

    None where a name has two values.
    """
    sides = [left, right]
    for place, other in ((0, right), (1, left)):
        items = _CONNECTIVE.sub(",", sides[place]).split(",")
        pairs = [match for item in items if (match := _PAIR.fullmatch(item.strip()))]
        if len(items) == 1 or len(pairs) != len(items) or not other.startswith("(") or "=" in other:
            continue
        if len({match[1] for match in pairs}) != len(pairs):
            return None
        sides[place] = "(" + ", ".join(match[2] for match in sorted(pairs, key=lambda match: match[1])) + ")"
    return sides[0], sides[1]


def _in_order(name: str) -> bool:
    """Whether the names of a tuple, as in "(x, y) =", stand in the order of the alphabet; true of a single name."""
    letters = re.findall(r"[A-Za-z]", name) if name.startswith("(") else []
    return letters == sorted(letters)


def _is_prose(text: str) -> bool:
    return bool(_PROSE.search(_ENVIRONMENT.sub("", text))) or not _MATHEMATICAL.search(text)


def _comparable(left: str, right: str) -> bool:
    """Whether mathematics may decide: no words, no number beside a number, the same brackets and signs, as many items.

    A pair of numbers is no choice between them.
    """
    if any(_is_prose(text) or _JUXTAPOSED.search(text) for text in (left, right)):
        return False
    brackets = _BRACKETED.fullmatch(left), _BRACKETED.fullmatch(right)
    if all(brackets) and brackets[0].groups() != brackets[1].groups():  # type: ignore[union-attr]
        return False
    for one, other in ((left, right), (right, left)):
        if one.startswith("(") and _ALTERNATIVE.search(other):
            return False
    if left.count("%") != right.count("%"):
        return False
    related = _RELATION.search(left) or _RELATION.search(right)
    return bool(related) or _items(left) == _items(right)


def _items(text: str) -> int:
    return len(re.findall("[,;]", _CONNECTIVE.sub(",", text))) + 1


def _same_expression(left: str, right: str) -> bool:
    ours, theirs = _expression(left), _expression(right)
    if not verify(ours, theirs, timeout_seconds=None, allow_set_relation_comp=True):
        return False
    # math-verify takes numbers that differ by less than its absolute rounding for equal, 1.6e-19 for 0.
    return not (ours and theirs and apart(ours[0], theirs[0]))


@lru_cache(maxsize=8192)
def _expression(text: str) -> list[Any]:
    text = _DIGITS_AND_COMMA.sub(", ", _CONNECTIVE.sub(", ", text.replace("%", "")))
    return parse(f"${text}$", [_LATEX], fallback_mode="no_fallback", parsing_timeout=None)
