r"""Grade a response against a reference answer and options.  Pure, deterministic, and without a time limit.

Only the last ``\boxed{}`` of the response counts.  Text and plain numbers are compared directly, all else by
math-verify, whose LaTeX parser builds SymPy expressions and can run for ever on a hostile one.  A caller that cannot
trust its responses therefore uses `ovr_megatron.rewards.pool.GraderPool`.
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
from ovr_megatron.rewards.precision import differ, numeric_value
from ovr_megatron.rewards.quantity import conversion, number, same_number, split_unit
from ovr_megatron.rewards.verdict import RIGHT, GradeRequest, Reason, Verdict

# units=False: `split_unit` has cut off units by a table that knows metres from variables.  Only LaTeX is parsed:
# math-verify evaluates plain expressions as Python code.
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
r"""Relative difference that is allowed between a value and an approximation beside it: \pi \approx 3."""
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
    right = None
    if request.options:
        right = right_option(request.answer, request.options)
    if right is None:
        reason = _open_answer(box, request.answer)
    else:
        reason = _among_options(box, request.options, right)
    return Verdict(reason, box)


def _among_options(box: str, options: Sequence[str], right: int) -> Reason:
    """Compare a box with the options: by letter, by the exact text, by letter and content, by value."""
    letter = named_letter(clean(box), len(options))
    box_key = key(box)
    exact = [index for index, option in enumerate(options) if key(option) == box_key]
    if letter and not letter.rest and (letter.capital or not exact):
        return Reason.LETTER if letter.index == right else Reason.OTHER_OPTION
    if exact:
        return _by_content(right, exact)
    if letter and letter.rest:
        matches = [index for index, option in enumerate(options) if same_plainly(option, letter.rest) in RIGHT]
        if letter.index not in matches and letter.strong and (letter.hedged or matches):
            return Reason.SEVERAL_OPTIONS if letter.hedged else Reason.CONTRADICTION
        if letter.index in matches or letter.strong:
            return Reason.LETTER if letter.index == right else Reason.OTHER_OPTION
    # The right option first: for most wrong answers one comparison by math-verify is enough.
    right_content = options[right]
    if compare(right_content, box) not in RIGHT:
        return Reason.DIFFERENT
    matches = [index for index, option in enumerate(options) if compare(option, box) in RIGHT]
    return _by_content(right, matches)


def _by_content(right: int, matches: list[int]) -> Reason:
    if right not in matches:
        return Reason.OTHER_OPTION
    return Reason.CONTENT if len(matches) == 1 else Reason.SEVERAL_OPTIONS


def _open_answer(box: str, answer: str) -> Reason:
    """Compare a box with an answer that is a letter without options, or a value."""
    reference = named_letter(clean(answer), 26)
    if reference and not reference.rest and reference.capital:
        letter = named_letter(clean(box), 26)
        if letter and letter.strong and not letter.hedged:
            return Reason.LETTER if letter.index == reference.index else Reason.DIFFERENT
    return compare(answer, box)


# Cached, since many responses to a prompt have the same answer, and options are compared twice.
@lru_cache(maxsize=8192)
def compare(reference: str, candidate: str) -> Reason:
    """Compare two written values; return `Reason.TEXT`, `NUMBER` or `MATH` if they are the same, else `DIFFERENT`."""
    reason = same_plainly(reference, candidate)
    if reason is not None:
        return reason
    values = _values(reference, candidate)
    if values is None:
        return Reason.DIFFERENT
    reference_value, candidate_value, scale = values
    if scale != 1 or not _comparable(reference_value, candidate_value):
        return Reason.DIFFERENT
    same = _same_expression(reference_value, candidate_value)
    return Reason.MATH if same else Reason.DIFFERENT


def same_plainly(reference: str, candidate: str) -> Reason | None:
    """Compare two written values as texts and plain numbers; return None if only mathematics can decide."""
    reference_key = key(reference)
    candidate_key = key(candidate)
    if reference_key == candidate_key:
        # Two texts of which nothing is left by cleaning are no agreement.
        return Reason.TEXT if reference_key else Reason.DIFFERENT
    values = _values(reference, candidate)
    if values is None:
        return Reason.DIFFERENT
    reference_value, candidate_value, scale = values
    if _is_prose(reference_value):
        same_words = reference_key.casefold() == candidate_key.casefold()
        return Reason.TEXT if same_words else Reason.DIFFERENT
    if scale == 1 and squeeze(reference_value) == squeeze(candidate_value):
        return Reason.TEXT
    same = _same_plain_number(reference_value, candidate_value, scale)
    if same is None:
        same = _same_in_a_base(reference_value, candidate_value)
    if same is None:
        return None
    return Reason.NUMBER if same else Reason.DIFFERENT


def _same_plain_number(reference: str, candidate: str, scale: Fraction) -> bool | None:
    """Return whether two plain numbers are the same, in percent or not; None if one is no plain number."""
    reference_value = number(reference.removesuffix("%").strip())
    candidate_value = number(candidate.removesuffix("%").strip())
    if reference_value is None or candidate_value is None:
        return None
    decimal = _is_decimal(reference) != _is_decimal(candidate)
    reference_percent = reference.endswith("%")
    candidate_percent = candidate.endswith("%")
    if reference_percent == candidate_percent:
        return same_number(reference_value, candidate_value * scale, decimal)
    # A percent sign may be left out or added where the question asks for percent, but 0.5 is not 0.5 %.
    if abs(reference_value) >= 1 and same_number(reference_value, candidate_value * scale, decimal):
        return True
    reference_fraction = reference_value / 100 if reference_percent else reference_value
    candidate_fraction = candidate_value / 100 if candidate_percent else candidate_value
    return same_number(reference_fraction, candidate_fraction, decimal)


def _same_in_a_base(reference: str, candidate: str) -> bool | None:
    """Return whether digits with a base (``101_2``) and digits without one are the same; None if neither has a base."""
    reference_match = _BASE.fullmatch(reference)
    candidate_match = _BASE.fullmatch(candidate)
    if reference_match is None and candidate_match is None:
        return None
    if reference_match and candidate_match:
        return False  # `squeeze` has compared the texts before
    reference_digits = reference_match[1] if reference_match else reference
    candidate_digits = candidate_match[1] if candidate_match else candidate
    return reference_digits == candidate_digits


def _is_decimal(text: str) -> bool:
    return "." in text and "\\overline" not in text


def _values(reference: str, candidate: str) -> tuple[str, str, Fraction] | None:
    """Cut units, names and approximations off both values; return the values and the factor between their units.

    The factor leads from the candidate's unit to the reference's.  None if the units measure different things, or if
    the candidate states several values.
    """
    exact, _ = _approximated(clean(reference))
    stated = _stated(clean(candidate), "=" in exact)
    if stated is None:
        return None
    reference_value, reference_unit = split_unit(exact)
    candidate_value, candidate_unit = split_unit(stated, attached=True)
    scale = conversion(reference_unit, candidate_unit)
    if scale is None:
        return None
    if number(reference_value) is not None:
        candidate_value = joined(candidate_value)
    tuples = _as_tuples(reference_value, candidate_value)
    if tuples is None:
        return None
    # After the tuples: "x = 3, y = 4" must keep its names until it has become one.
    reference_value, candidate_value = _without_names(*tuples)
    return reference_value, candidate_value, scale


def _without_names(reference: str, candidate: str) -> tuple[str, str]:
    """Cut off names such as "x =" or "(x, y) =", unless the sides have different names or a side is an equation.

    Of "y = 2x + 1" and "2x - y + 1 = 0" both are equations; of "y = 2x + 1" and "2x + 1" one has a name.
    """
    names = []
    has_equation = False
    for text in (reference, candidate):
        match = _ASSIGNMENT.match(text) or _TUPLE_NAMES.match(text)
        names.append(match.group() if match else "")
        has_equation = has_equation or (match is None and "=" in text)
    spellings = {name for name in names if name}
    if len(spellings) != 1 or has_equation:
        return reference, candidate
    reference_name, candidate_name = names
    return _without_name(reference, reference_name), _without_name(candidate, candidate_name)


def _without_name(text: str, name: str) -> str:
    return text[len(name) :] if _in_order(name) else text


def _approximated(text: str) -> tuple[str, list[str]]:
    """Split at signs of approximation; return the value and its approximations.

    The value is the first part, or the second one if the first is empty or a name.
    """
    parts = text.split("\\approx")
    value, *approximations = (part.strip() for part in parts)
    if approximations and (not value or _NAME.fullmatch(value)):
        value, *approximations = approximations
    return value, approximations


def _stated(text: str, equation: bool) -> str | None:
    r"""Return the value that a chain like "x = 2\sqrt{5} \approx 4.47" states; None if its members disagree.

    With ``equation`` the reference is an equation, and "=" belongs to the value.
    """
    value, approximations = _approximated(text)
    # A list such as "x = 3, y = 4" has several values and is no chain.
    is_list = "," in value or _CONNECTIVE.search(value)
    if "=" in value and not equation and not is_list:
        *earlier, value = (part.strip() for part in value.split("="))
        for part in earlier:
            number_text, _ = split_unit(part, attached=True)
            # A member with symbols is a name or a formula and has no value to compare.
            is_symbolic = _SYMBOL.search(number_text)
            if part and not is_symbolic and compare(part, value) not in RIGHT:
                return None
    for approximation in approximations:
        if not _near(value, approximation):
            return None
    return value


def _near(value: str, approximation: str) -> bool:
    """Return whether both are numbers and one may be a rounding of the other, also as percent."""
    sides = []
    for text in (value, approximation):
        number_text, _ = split_unit(text, attached=True)
        side = number_text.removesuffix("%").strip()
        if not side or _is_prose(side) or _JUXTAPOSED.search(side):
            return False
        sides.append(side)
    exact, rounded = (_value_of(side) for side in sides)
    if exact is None or rounded is None:
        return False
    tolerance = ROUNDING * abs(rounded)
    return any(abs(exact * factor - rounded) <= tolerance for factor in (1, 100))


def _value_of(text: str) -> Any | None:
    expressions = _expression(text)
    if not expressions:
        return None
    return numeric_value(expressions[0])


def _as_tuples(reference: str, candidate: str) -> tuple[str, str] | None:
    """Write "x = 3, y = 4" as "(3, 4)", by the order of the names, where the other side is a tuple.

    None if a name has two values.
    """
    sides = [reference, candidate]
    for index, other in ((0, candidate), (1, reference)):
        items = _CONNECTIVE.sub(",", sides[index]).split(",")
        values: dict[str, str] = {}
        pairs = 0
        for item in items:
            match = _PAIR.fullmatch(item.strip())
            if match:
                name, value = match.groups()
                values[name] = value
                pairs += 1
        is_assignment = len(items) > 1 and pairs == len(items)
        is_beside_tuple = other.startswith("(") and "=" not in other
        if not is_assignment or not is_beside_tuple:
            continue
        if len(values) != pairs:
            return None
        in_order = [values[name] for name in sorted(values)]
        sides[index] = f"({', '.join(in_order)})"
    return sides[0], sides[1]


def _in_order(name: str) -> bool:
    """Return whether the names of a tuple, as in "(x, y) =", are in alphabetical order; true of a single name."""
    if not name.startswith("("):
        return True
    letters = re.findall(r"[A-Za-z]", name)
    return letters == sorted(letters)


def _is_prose(text: str) -> bool:
    # The names of environments, as in \begin{pmatrix}, are no words.
    without_environments = _ENVIRONMENT.sub("", text)
    if _PROSE.search(without_environments):
        return True
    return not _MATHEMATICAL.search(text)


def _comparable(reference: str, candidate: str) -> bool:
    """Return whether mathematics may decide whether two values are the same.

    Neither has words or a number beside a number, and both have the same brackets, as many percent signs and as many
    items.  A pair of numbers is not comparable with a choice between numbers.
    """
    for text in (reference, candidate):
        if _is_prose(text) or _JUXTAPOSED.search(text):
            return False
    reference_brackets = _BRACKETED.fullmatch(reference)
    candidate_brackets = _BRACKETED.fullmatch(candidate)
    if reference_brackets and candidate_brackets and reference_brackets.groups() != candidate_brackets.groups():
        return False
    # "(1, 2)" is no "1 or 2", though both have two items.
    for text, other in ((reference, candidate), (candidate, reference)):
        if text.startswith("(") and _ALTERNATIVE.search(other):
            return False
    if reference.count("%") != candidate.count("%"):
        return False
    # "1 < x < 2" and "(1, 2)" may be the same interval, with and without a comma.
    if _RELATION.search(reference) or _RELATION.search(candidate):
        return True
    return _items(reference) == _items(candidate)


def _items(text: str) -> int:
    separated = _CONNECTIVE.sub(",", text)
    separators = re.findall("[,;]", separated)
    return len(separators) + 1


def _same_expression(reference: str, candidate: str) -> bool:
    reference_parse = _expression(reference)
    candidate_parse = _expression(candidate)
    # No timeout here: math-verify's needs SIGALRM in the main thread.  The pool limits the time of its workers.
    if not verify(reference_parse, candidate_parse, timeout_seconds=None, allow_set_relation_comp=True):
        return False
    if not reference_parse or not candidate_parse:
        return True
    # math-verify takes numbers that differ by less than an absolute rounding for equal: 1.6e-19 for 0.
    return not differ(reference_parse[0], candidate_parse[0])


@lru_cache(maxsize=8192)
def _expression(text: str) -> list[Any]:
    """Parse a value; the first entry of the result is a SymPy expression, and an empty result is no expression."""
    # "and" and "or" separate the values of a list.  Percent signs were compared before.
    without_percent = text.replace("%", "")
    separated = _CONNECTIVE.sub(", ", without_percent)
    text = _DIGITS_AND_COMMA.sub(", ", separated)
    return parse(f"${text}$", [_LATEX], fallback_mode="no_fallback", parsing_timeout=None)
