"""Rules by which responses are graded: built-in ones by name, and functions of the user's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from typing import Any

from ovr_megatron.errors import UserError
from ovr_megatron.rewards.choice import named_letter, right_option
from ovr_megatron.rewards.latex import MAX_ANSWER, clean, joined, key, last_box
from ovr_megatron.rewards.quantity import conversion, number, split_unit
from ovr_megatron.rewards.signature import signature_problem
from ovr_megatron.rewards.verdict import GradeRequest, Reason, Verdict
from ovr_megatron.runtime.environment import child_environment
from ovr_megatron.runtime.registry import Registry
from ovr_megatron.runtime.stop import USER_ERROR

Rule = Callable[[GradeRequest], Verdict]
RewardFunction = Callable[[str, str, Sequence[str]], float]
"""A user's function of response, answer and options that returns a reward in 0..1."""
TOLERANCE = Fraction(1, 100)
# What a user's function may raise and be reported for.  Any other error ends the worker, which is reported, too.
RULE_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, NameError, OSError),
    *(RuntimeError, StopIteration, SyntaxError, TypeError, ValueError),
)
# What may stand between the letters of an answer with several right options.
_BETWEEN = re.compile(r"\bAND\b|[\s,;/&.()\[\]{}]")


class RuleError(UserError, ValueError):
    """A rule does not exist or cannot be imported; the message has the remedy."""


@lru_cache(maxsize=64)
def rule(name: str) -> Rule:
    """Return the rule of this name.

    ``auto``: options by letter or content if there are some; else equal text, an equal number, or equal by math-verify,
    in this order.  ``math``: the same without options.  ``exact``: equal text.  ``choice``: the letter of the right
    option, nothing else.  ``letters``: the letters of all right options, in any order.  ``numeric`` or
    ``numeric:0.05``: a number within this relative tolerance, 0.01 by default.  ``within:0.001``: a number within this
    absolute tolerance; `check` refuses a tolerance that is no number.
    ``package.module:function``: a user's function of response, answer and options that returns a reward in 0..1.

    Raises:
        RuleError: there is no such rule.
    """
    kind, colon, parameter = name.partition(":")
    if kind == "numeric" and colon:
        return lambda request: _numeric(request, share=_tolerance(name, parameter))
    if kind == "within" and colon:
        return lambda request: _numeric(request, distance=_tolerance(name, parameter))
    return RULES.look_up(name)


def check(name: str) -> None:
    """Refuse a rule that would not work.

    A user's function is imported in a process with the graders' search path, not in this one: a module that only the
    current folder has would be found here and be missing there.

    Raises:
        RuleError: has the reason and the remedy.
    """
    kind, _, parameter = name.partition(":")
    if kind in ("numeric", "within"):
        _tolerance(name, parameter)
    elif name not in RULES.rows:
        command = [sys.executable, "-m", __spec__.name, name]
        process = subprocess.run(command, capture_output=True, text=True, env=child_environment(os.environ))
        if process.returncode:
            # A user error is printed on stdout; any other failure ends with a traceback on stderr.
            output = process.stdout if process.returncode == USER_ERROR else process.stderr
            _, _, last_line = output.strip().rpartition("\n")
            raise RuleError(last_line or f"{name}: its import ended with code {process.returncode}")


def place_of(function: RewardFunction) -> str:
    """Return ``module:function`` of a user's function, under which grader processes import it.

    It must stand at the top level of a module, under its own name: graders are processes of their own, which get no
    lambda, no function within another one, no method, and nothing of the script that runs.  That its folder is in
    PYTHONPATH is left to `check`.

    Raises:
        RuleError: it is none of these; has the remedy.
    """
    module = getattr(function, "__module__", None)
    name = getattr(function, "__qualname__", None)
    remedy = "write it as a function of a module whose folder is in PYTHONPATH, and import it from there"
    if module is None or name is None:
        raise RuleError(f"reward: an object of {type(function).__name__} is no function; {remedy}")
    if module == "__main__":
        raise RuleError(f"reward: {name} stands in the program itself, which graders cannot import; {remedy}")
    if not name.isidentifier() or getattr(sys.modules.get(module), name, None) is not function:
        raise RuleError(f"reward: {module} has no function {name} at its top level, which graders import; {remedy}")
    return f"{module}:{name}"


def is_plain(name: str) -> bool:
    """Return whether the rule is one of `RULES` and no function of the user's."""
    return name.partition(":")[0] in RULES.rows


def cache_key(request: GradeRequest) -> tuple[object, ...] | None:
    """Return all on which the verdict depends; None for a user's function, which may read the whole response."""
    if not is_plain(request.rule):
        return None
    box = last_box(request.response, request.thinking)
    return request.rule, request.answer, request.options, box


def _boxed(request: GradeRequest) -> Verdict | str:
    """Return the content of the last box, or the verdict on a response without a usable one."""
    box = last_box(request.response, request.thinking)
    if box is None:
        return Verdict(Reason.NO_BOX)
    if len(box) > MAX_ANSWER:
        return Verdict(Reason.LONG_BOX, box[:MAX_ANSWER])
    if not clean(box):
        return Verdict(Reason.EMPTY_BOX, box)
    return box


def _auto(request: GradeRequest) -> Verdict:
    # SymPy takes a second to import, and a trainer calls only `check`.
    from ovr_megatron.rewards import grader  # noqa: PLC0415

    return grader.grade(request)


def _math(request: GradeRequest) -> Verdict:
    return _auto(replace(request, options=()))


def _exact(request: GradeRequest) -> Verdict:
    box = _boxed(request)
    if isinstance(box, Verdict):
        return box
    same = key(box) == key(request.answer)
    return Verdict(Reason.TEXT if same else Reason.DIFFERENT, box)


def _choice(request: GradeRequest) -> Verdict:
    box = _boxed(request)
    if isinstance(box, Verdict):
        return box
    count = len(request.options) or 26
    right = None
    if request.options:
        right = right_option(request.answer, request.options)
    if right is None:
        reference = named_letter(clean(request.answer), count)
        right = reference.index if reference else None
    letter = named_letter(clean(box), count)
    if letter is None:
        return Verdict(Reason.DIFFERENT, box)
    if letter.hedged:
        return Verdict(Reason.SEVERAL_OPTIONS, box)
    if letter.index == right:
        return Verdict(Reason.LETTER, box)
    return Verdict(Reason.OTHER_OPTION, box)


def _letters(request: GradeRequest) -> Verdict:
    box = _boxed(request)
    if isinstance(box, Verdict):
        return box
    text = clean(box)
    reference = _letters_of(request.answer)
    letters = _letters_of(text)
    # A single right option may be named like any choice: "(b)", "B: content".
    option = None
    if len(reference) == 1:
        option = named_letter(text, 26)
    if option and option.strong and not option.hedged:
        letters = {chr(ord("A") + option.index)}
    # A reference without letters is equal to an answer without any, and says nothing.
    if reference and reference == letters:
        return Verdict(Reason.LETTER, box)
    return Verdict(Reason.DIFFERENT, box)


def _letters_of(text: str) -> set[str]:
    """Return the letters or digits of "B, D", "(b) and (d)", "B/D" or "BD"; none if one comes twice, as in words."""
    letters = _BETWEEN.sub("", clean(text).upper())
    distinct = set(letters)
    if not letters.isalnum() or len(distinct) < len(letters):
        return set()
    return distinct


def _within_share(request: GradeRequest) -> Verdict:
    return _numeric(request, share=TOLERANCE)


def _within_distance(request: GradeRequest) -> Verdict:
    return _numeric(request, distance=TOLERANCE)


def _numeric(request: GradeRequest, share: Fraction = Fraction(0), distance: Fraction = Fraction(0)) -> Verdict:
    box = _boxed(request)
    if isinstance(box, Verdict):
        return box
    reference_text, reference_unit = split_unit(clean(request.answer))
    text, unit = split_unit(clean(box), attached=True)
    reference = number(joined(reference_text))
    value = number(joined(text))
    factor = conversion(reference_unit, unit)
    if reference is None or value is None or factor is None:
        return Verdict(Reason.DIFFERENT, box)
    tolerance = max(share * abs(reference), distance)
    difference = abs(reference - value * factor)
    same = difference <= tolerance
    return Verdict(Reason.NUMBER if same else Reason.DIFFERENT, box)


def _tolerance(name: str, text: str) -> Fraction:
    try:
        tolerance = Fraction(text) if text else TOLERANCE
    except (ValueError, ZeroDivisionError):
        tolerance = Fraction(-1)  # refused below, like any negative number
    # A share of 1 would accept 0 for every reference.
    is_whole_share = tolerance >= 1 and name.startswith("numeric")
    if tolerance < 0 or is_whole_share:
        raise RuleError(f"{name}: the tolerance must be a number, as in within:0.001 or, below 1, numeric:0.05")
    return tolerance


def _user_rule(function: Any) -> Rule | None:
    """Return the rule that calls a user's function; None for an object that is no function.

    Raises:
        RuleError: it takes other values than response, answer and options.
    """
    if not callable(function):
        return None
    if problem := signature_problem(function):
        raise RuleError(problem)

    def grade_by_user(request: GradeRequest) -> Verdict:
        try:
            # Any number will do, also a NumPy scalar or a bool.
            score = float(function(request.response, request.answer, request.options))
        except RULE_ERRORS as error:
            return Verdict(Reason.RAISED, f"{type(error).__name__}: {error}"[:MAX_ANSWER])
        if not 0 <= score <= 1:
            return Verdict(Reason.RAISED, f"a reward of {score}, which is not in 0..1")
        return Verdict(Reason.USER_RULE, None, score)

    return grade_by_user


# The built-in rules without a parameter.  There is no function that registers others: graders are processes of their
# own, which would not have them.
RULES = Registry[Rule](
    "rule",
    {
        "auto": _auto,
        "math": _math,
        "exact": _exact,
        "choice": _choice,
        "letters": _letters,
        "numeric": _within_share,
        "within": _within_distance,
    },
    _user_rule,
    error=RuleError,
)


if __name__ == "__main__":  # the process that `check` starts
    try:
        RULES.look_up(sys.argv[1])
    except RuleError as error:
        print(error)
        sys.exit(USER_ERROR)
