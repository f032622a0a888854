"""Check, before a run starts, that a user's reward function can be called as graders call it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

# Values as graders pass them: response, answer, options.
_VALUES = ("", "", ())
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
# Parameters of the reward functions of other trainers, which take other values under these names.
_NAMES_ELSEWHERE = {
    "data_source": "verl",
    "solution_str": "verl",
    "ground_truth": "verl",
    "completions": "TRL and ms-swift",
    "prompts": "TRL and ms-swift",
}


def signature_problem(function: Callable[..., Any]) -> str | None:
    """Return why ``function`` is no reward of response, answer, options and, if it asks for it, row; None if it may be.

    Parameters of other trainers' functions are refused even where three values would fit: a function of verl would take
    the response for its ``data_source``.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a compiled function without one
        return None
    place = f"{function.__module__}:{getattr(function, '__qualname__', function)}"
    remedy = (
        "write it as (response, answer, options), or with row, all of one response, and return a number from 0 to 1"
    )
    for name in signature.parameters:
        if name in _NAMES_ELSEWHERE:
            return f"{place} has the parameter {name} of a reward of {_NAMES_ELSEWHERE[name]}; {remedy}"
    row_name = row_parameter(function)
    values: tuple[object, ...] = (*_VALUES, {}) if row_name == "" else _VALUES
    keywords: dict[str, object] = {row_name: {}} if row_name else {}
    try:
        signature.bind(*values, **keywords)
    except TypeError as error:
        return f"{place}{signature} cannot be called with three values ({error}); {remedy}"
    return None


def row_parameter(function: Callable[..., Any]) -> str | None:
    """Return how a function takes the row: "row" by this name, "" as its fourth argument, None not at all."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a compiled function without one
        return None
    if "row" in parameters:
        return "row"
    required = [p for p in parameters.values() if p.kind in _POSITIONAL and p.default is inspect.Parameter.empty]
    return "" if len(required) == 4 else None
