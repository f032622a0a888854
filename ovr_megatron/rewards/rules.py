"""What makes a response right: the rule of its source, by name or as a function of the user's."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache

from ovr_megatron.errors import UserError
from ovr_megatron.rewards.choice import named_letter, right_option
from ovr_megatron.rewards.latex import MAX_ANSWER, clean, joined, key, last_box
from ovr_megatron.rewards.quantity import conversion, number, split_unit
from ovr_megatron.rewards.verdict import GradeRequest, Reason, Verdict
from ovr_megatron.runtime.environment import child_environment
from ovr_megatron.runtime.stop import USER_ERROR

Rule = Callable[[GradeRequest], Verdict]
TOLERANCE = Fraction(1, 100)
MISTAKES = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, NameError, OSError),
    *(RuntimeError, StopIteration, SyntaxError, TypeError, ValueError),
)
_BETWEEN = re.compile(r"\bAND\b|[\s,;/&.()\[\]{}]")
PLAIN = ("auto", "math", "exact", "choice", "letters", "numeric", "within")


class RuleError(UserError, ValueError):
    """A rule that does not exist or cannot be imported; says what to write instead."""


@lru_cache(maxsize=64)
def rule(name: str) -> Rule:
    """The rule of this name.

    ``auto``: options by letter or content where there are some, else text, number or math-verify.  ``math``: the same
    without options.  ``exact``: the same text.  ``choice``: the letter of the right option, nothing else.  ``letters``:
    the letters of all right options, in any order.  ``numeric`` or ``numeric:0.05``: a number within this share of the
    reference, one part in a hundred if none is given.  ``within:0.001``: a number no further from the reference.
    ``package.module:function``: the user's; it gets response, answer and options and returns a reward in 0..1.

    Raises:
        RuleError: no such rule.
    """
    kind, _, rest = name.partition(":")
    if kind in ("auto", "math") and not rest:
        from ovr_megatron.rewards import grader  # SymPy takes a second to import, and a trainer checks names alone

        return grader.grade if kind == "auto" else lambda r: grader.grade(replace(r, options=()))
    if kind == "exact" and not rest:
        return _exact
    if kind == "choice" and not rest:
        return _choice
    if kind == "letters" and not rest:
        return _letters
    if kind == "numeric":
        return lambda request: _numeric(request, share=_tolerance(name, rest))
    if kind == "within":
        return lambda request: _numeric(request, distance=_tolerance(name, rest))
    return _own(name)


def check(name: str) -> None:
    """Refuse a rule that would not work.

    A function of the user's is imported in a process with the graders' own search path, not in this one: what only the
    current folder has would be found here and be missing there.

    Raises:
        RuleError: says why.
    """
    kind, _, rest = name.partition(":")
    if kind in ("numeric", "within"):
        _tolerance(name, rest)
    elif name not in PLAIN:
        command = [sys.executable, "-m", __spec__.name, name]
        done = subprocess.run(command, capture_output=True, text=True, env=child_environment(os.environ))
        if done.returncode:
            problem = (done.stdout if done.returncode == USER_ERROR else done.stderr).strip()
            raise RuleError(problem.rpartition("\n")[2] or f"{name}: its import ended with code {done.returncode}")


def is_plain(name: str) -> bool:
    """Whether the rule is one of `PLAIN` and no function of the user's."""
    return name.partition(":")[0] in PLAIN


def cached_by(request: GradeRequest) -> tuple | None:
    """What a verdict depends on, to remember it by; None for a user's function, which may look at all of a response."""
    if not is_plain(request.rule):
        return None
    return request.rule, request.answer, request.options, last_box(request.response, request.thinking)


def _boxed(request: GradeRequest) -> Verdict | str:
    box = last_box(request.response, request.thinking)
    if box is None:
        return Verdict(Reason.NO_BOX)
    if len(box) > MAX_ANSWER:
        return Verdict(Reason.LONG_BOX, box[:MAX_ANSWER])
    return box if clean(box) else Verdict(Reason.EMPTY_BOX, box)


def _exact(request: GradeRequest) -> Verdict:
    box = _boxed(request)
    if isinstance(box, Verdict):
        return box
    return Verdict(Reason.TEXT if key(box) == key(request.answer) else Reason.DIFFERENT, box)


def _choice(request: GradeRequest) -> Verdict:
    box = _boxed(request)
    if isinstance(box, Verdict):
        return box
    count = len(request.options) or 26
    right = right_option(request.answer, request.options) if request.options else None
    if right is None:
        reference = named_letter(clean(request.answer), count)
        right = reference.index if reference else None
    named = named_letter(clean(box), count)
    if named is None or named.hedged:
        return Verdict(Reason.DIFFERENT if named is None else Reason.SEVERAL_OPTIONS, box)
    return Verdict(Reason.LETTER if named.index == right else Reason.OTHER_OPTION, box)


def _letters(request: GradeRequest) -> Verdict:
    box = _boxed(request)
    if isinstance(box, Verdict):
        return box
    wanted, text = _named(request.answer), clean(box)
    one = named_letter(text, 26) if len(wanted) == 1 else None
    given = {chr(ord("A") + one.index)} if one and one.strong and not one.hedged else _named(text)
    return Verdict(Reason.LETTER if wanted and wanted == given else Reason.DIFFERENT, box)


def _named(text: str) -> set[str]:
    """The letters or digits of "B, D", "(b) and (d)", "B/D" or "BD"; none where one comes twice, as in words."""
    found = _BETWEEN.sub("", clean(text).upper())
    return set(found) if found.isalnum() and len(set(found)) == len(found) else set()


def _numeric(request: GradeRequest, share: Fraction = Fraction(0), distance: Fraction = Fraction(0)) -> Verdict:
    box = _boxed(request)
    if isinstance(box, Verdict):
        return box
    wanted, unit = split_unit(clean(request.answer))
    given, other = split_unit(clean(box), attached=True)
    a, b, factor = number(joined(wanted)), number(joined(given)), conversion(unit, other)
    if a is None or b is None or factor is None:
        return Verdict(Reason.DIFFERENT, box)
    b *= factor
    return Verdict(Reason.NUMBER if abs(a - b) <= max(share * abs(a), distance) else Reason.DIFFERENT, box)


def _tolerance(name: str, text: str) -> Fraction:
    try:
        found = Fraction(text) if text else TOLERANCE
    except (ValueError, ZeroDivisionError):
        found = Fraction(-1)
    if found < 0 or (found >= 1 and name.startswith("numeric")):
        raise RuleError(f"{name}: the tolerance must be a number, as in within:0.001 or, below 1, numeric:0.05")
    return found


def _own(name: str) -> Rule:
    module, colon, function = name.partition(":")
    if not colon or not module or not function.isidentifier():
        raise RuleError(f"{name!r} is no rule; choose one of {', '.join(PLAIN)}, or write package.module:function")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise RuleError(f"{name}: {error}; is its folder in PYTHONPATH?") from error
    if not callable(found):
        raise RuleError(f"{name} is no function")

    def own(request: GradeRequest) -> Verdict:
        try:
            score = float(found(request.response, request.answer, request.options))
        except MISTAKES as error:  # of the user's function; any other ends the worker, which is counted, too
            return Verdict(Reason.RAISED, f"{type(error).__name__}: {error}"[:MAX_ANSWER])
        if not 0 <= score <= 1:
            return Verdict(Reason.RAISED, f"a reward of {score}, which is not in 0..1")
        return Verdict(Reason.OWN, None, score)

    return own


if __name__ == "__main__":  # for `check`
    try:
        _own(sys.argv[1])
    except RuleError as error:
        print(error)
        sys.exit(USER_ERROR)
