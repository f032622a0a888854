"""Rules by which responses are graded: built-in ones by name, and functions of the user's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from ovr_megatron.rewards.choice import named_letter, right_option, verifiable
from ovr_megatron.rewards.latex import MAX_ANSWER, clean, joined, key, last_box
from ovr_megatron.rewards.perception import PERCEPTION, needs_image, reference_problem
from ovr_megatron.rewards.quantity import conversion, number, split_unit
from ovr_megatron.rewards.signature import row_parameter, signature_problem
from ovr_megatron.rewards.style import LANGUAGES, format_rule, language_of, language_rule, repetition_rule
from ovr_megatron.rewards.verdict import GradeRequest, Reason, RuleError, Verdict
from ovr_megatron.runtime.environment import child_environment
from ovr_megatron.runtime.registry import Registry
from ovr_megatron.runtime.stop import USER_ERROR

if TYPE_CHECKING:  # a program that only grades loads neither images nor NumPy
    from ovr_megatron.data.schema import Row

Rule = Callable[[GradeRequest], Verdict]
RewardFunction = Callable[..., float]
"""A user's function of response, answer and options, and by name of the ``row``, that returns a reward in 0..1."""
JUDGE = "judge:"
"""Beginning of the name of a rule that asks a judge of ``reward.judges``."""
TOLERANCE = Fraction(1, 100)
# What a user's function may raise and be reported for.  Any other error ends the worker, which is reported, too.
RULE_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, NameError, OSError),
    *(RuntimeError, StopIteration, SyntaxError, TypeError, ValueError),
)
# What may stand between the letters of an answer with several right options.
_BETWEEN = re.compile(r"\bAND\b|[\s,;/&.()\[\]{}]")


@lru_cache(maxsize=64)
def rule(name: str) -> Rule:
    """Return the rule of this name.

    ``auto``: options by letter or content if there are some; else equal text, an equal number, or equal by math-verify,
    in this order.  ``math``: the same without options.  ``exact``: equal text.  ``choice``: the letter of the right
    option, nothing else.  ``letters``: the letters of all right options, in any order.  ``numeric`` or
    ``numeric:0.05``: a number within this relative tolerance, 0.01 by default.  ``within:0.001``: a number within this
    absolute tolerance.  ``box``, ``boxes``, ``point``, ``count`` and ``ocr``: see `ovr_megatron.rewards.perception`;
    ``format``, ``language`` and ``repetition``: see `ovr_megatron.rewards.style`.
    ``package.module:function``: a user's function of response, answer and options, and of the row where it has a
    parameter ``row``, that returns a reward in 0..1.

    Raises:
        RuleError: there is no such rule, or a parameter of it cannot work.
    """
    kind, colon, parameters = name.partition(":")
    if colon and kind in PARAMETRISED:
        return PARAMETRISED[kind](parameters)
    if colon and kind in RULES.rows:
        raise RuleError(f"{name}: the rule {kind} takes no parameter; a module of yours needs another name")
    return RULES.look_up(name)


def check(name: str) -> None:
    """Refuse a rule that would not work.

    A user's function is imported in a process with the graders' search path, not in this one: a module that only the
    current folder has would be found here and be missing there.

    Raises:
        RuleError: has the reason and the remedy.
    """
    if is_judge(name):
        return
    if is_plain(name):
        rule(name)
        return
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
    """Return whether the rule is built in, and no judge and no function of the user's."""
    return name.partition(":")[0] in RULES.rows


def is_judge(name: str) -> bool:
    """Return whether the rule is ``judge:NAME``, a model that is asked."""
    return name.startswith(JUDGE)


def reads_box(name: str) -> bool:
    r"""Return whether the rule depends on the last ``\boxed{}`` of a response alone."""
    return name.partition(":")[0] in BOX_RULES


def reads_image_size(name: str) -> bool:
    """Return whether the rule scales the coordinates of its reference by the size of the row's only image."""
    kind, _, parameters = name.partition(":")
    return kind in PERCEPTION and needs_image(parameters)


def resolved(name: str, row: Row | None) -> str:
    """Return the rule's name with what it takes from the row in it: ``language`` is that of the row's question."""
    return f"language:{language_of(row)}" if name == "language" and row is not None else name


def is_verifying(name: str) -> bool:
    """Return whether the rule is built in and compares with the reference answer, which must have a form it reads."""
    kind = name.partition(":")[0]
    return kind in BOX_RULES or kind in PERCEPTION


def ignores_answer(name: str) -> bool:
    """Return whether the rule is one of style, which needs no reference answer."""
    return is_plain(name) and not is_verifying(name)


def answer_problem(name: str, answer: str, options: Sequence[str]) -> str | None:
    """Return why no grader could verify ``answer`` by the rule called ``name``, None if one can."""
    kind, _, parameters = name.partition(":")
    if kind in PERCEPTION:
        return reference_problem(kind, parameters, answer)
    return verifiable(answer, options) if kind in BOX_RULES else None


def cache_key(request: GradeRequest) -> tuple[object, ...] | None:
    """Return all on which the verdict depends; None for a rule that reads more of the response than its last box."""
    assert isinstance(request.rule, str), "weighted rules are graded one by one"
    if not reads_box(request.rule):
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


def _share_rule(parameters: str) -> Rule:
    share = _tolerance(f"numeric:{parameters}", parameters)
    return lambda request: _numeric(request, share=share)


def _distance_rule(parameters: str) -> Rule:
    distance = _tolerance(f"within:{parameters}", parameters)
    return lambda request: _numeric(request, distance=distance)


def _perception_rule(kind: str, parameters: str) -> Rule:
    """Return the perception rule ``kind``, whose verdict on an unusable reference is a failure."""
    grade = PERCEPTION[kind](parameters)

    def grade_checked(request: GradeRequest) -> Verdict:
        problem = reference_problem(kind, parameters, request.answer)
        if problem is None and needs_image(parameters) and request.image is None:
            problem = "the size of the image is not known here, by which its coordinates are scaled"
        return grade(request) if problem is None else Verdict(Reason.BAD_REFERENCE, problem)

    return grade_checked


def _language_rule(parameters: str) -> Rule:
    if parameters not in LANGUAGES:
        languages = " or ".join(f"language:{name}" for name in LANGUAGES)
        raise RuleError(f"language:{parameters}: this language is not known; give {languages}, or language alone")
    return partial(language_rule, parameters)


def _language_of_row(request: GradeRequest) -> Verdict:
    return Verdict(Reason.BAD_REFERENCE, "the question is not known here, whose language the response is to have")


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
    row_name = row_parameter(function)

    def grade_by_user(request: GradeRequest) -> Verdict:
        arguments: list[object] = [request.response, request.answer, request.options]
        keywords: dict[str, object] = {}
        if row_name is not None:
            if request.row is None:
                return Verdict(Reason.NEEDS_ROW)
            if row_name:
                keywords[row_name] = request.row
            else:
                arguments.append(request.row)
        try:
            # Any number will do, also a NumPy scalar or a bool.
            score = float(function(*arguments, **keywords))
        except RULE_ERRORS as error:
            return Verdict(Reason.RAISED, f"{type(error).__name__}: {error}"[:MAX_ANSWER])
        if not 0 <= score <= 1:
            return Verdict(Reason.RAISED, f"a reward of {score}, which is not in 0..1")
        return Verdict(Reason.USER_RULE, None, score)

    return grade_by_user


# Rules that depend on the last box alone, without a parameter.
BOX_RULES: dict[str, Rule] = {
    "auto": _auto,
    "math": _math,
    "exact": _exact,
    "choice": _choice,
    "letters": _letters,
    "numeric": _within_share,
    "within": _within_distance,
}
# By the name before the colon, functions from the parameters behind it to the rule.
PARAMETRISED: dict[str, Callable[[str], Rule]] = {
    "numeric": _share_rule,
    "within": _distance_rule,
    "language": _language_rule,
    **{kind: partial(_perception_rule, kind) for kind in PERCEPTION},
}
# The built-in rules without a parameter.  There is no function that registers others: graders are processes of their
# own, which would not have them.
RULES = Registry[Rule](
    "rule",
    {
        **BOX_RULES,
        **{kind: _perception_rule(kind, "") for kind in PERCEPTION},
        "format": format_rule,
        "language": _language_of_row,
        "repetition": repetition_rule,
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
