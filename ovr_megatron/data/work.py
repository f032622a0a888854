"""The work of a row in a step, by which the packs of a step are shared among the replicas."""

from __future__ import annotations

from collections.abc import Callable

from ovr_megatron.data.schema import Row

RowWork = Callable[[Row, int], float]
"""From a row and its tokens to its work, in any unit; only headers of images are read."""


def attention_work(row: Row, length: int) -> int:
    """Return the squared tokens of a row: the language model's attention, where packs have as many tokens as others."""
    return length**2
