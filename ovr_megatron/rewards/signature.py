"""Check, before a run starts, that a user's reward function can be called as graders call it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

# Values as graders pass them: response, answer, options.
_VALUES = ("", "", ())
# Parameters of the reward functions of other trainers, which take other values under these names.
_NAMES_ELSEWHERE = {
    "data_source": "verl",
    "solution_str": "verl",
    "ground_truth": "verl",
    "completions": "TRL and ms-swift",
    "prompts": "TRL and ms-swift",
}


def signature_problem(function: Callable[..., Any]) -> str | None:
    """Return why ``function`` is no reward of response, answer and options; None if it may be one.

    Parameters of other trainers' functions are refused even where three values would fit: a function of verl would take
    the response for its ``data_source``.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a compiled function without one
        return None
    place = f"{function.__module__}:{getattr(function, '__qualname__', function)}"
    remedy = "write it as (response, answer, options), all of one response, and return a number from 0 to 1"
    for name in signature.parameters:
        if name in _NAMES_ELSEWHERE:
            return f"{place} has the parameter {name} of a reward of {_NAMES_ELSEWHERE[name]}; {remedy}"
    try:
        signature.bind(*_VALUES)
    except TypeError as error:
        return f"{place}{signature} cannot be called with three values ({error}); {remedy}"
    return None
