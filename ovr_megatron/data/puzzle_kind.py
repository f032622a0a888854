"""Define the types that a kind of generated problem consists of."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from ovr_megatron.data.schema import Part

Params = Mapping[str, Any]


@dataclass(frozen=True)
class Puzzle:
    """A problem as it is asked, the response that solves it (after the opened ``<think>``) and the answer."""

    parts: tuple[Part, ...]
    response: str
    answer: str


@dataclass(frozen=True)
class Number:
    """A numeric parameter: its default and its bounds, both included."""

    default: float
    low: float
    high: float


@dataclass(frozen=True)
class Kind:
    """Functions that draw and pose a problem, and its parameters: a `Number`, or choices with the default first."""

    draw: Callable[[Random, Params], Hashable]
    # The problem is `Any`: each kind poses the type that its own `draw` returns.
    pose: Callable[[Any, Random, Params], Puzzle]
    parameters: Mapping[str, Number | tuple[str, ...]]


def box(thinking: str, answer: int) -> str:
    """End a response: close the thinking, give the answer in a box."""
    return f"{thinking}So</think>\\boxed{{{answer}}}"
