"""YaRN: more positions than a model was trained with, by stretched rotary frequencies.  No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovr_megatron.families.config_json import ShapeError, is_number

_OPTIONS = ("beta_fast", "beta_slow", "attention_factor")
_FIELDS = {"type", "rope_type", "rope_theta", "mrope_section", "mrope_interleaved", "truncate", *_OPTIONS}
_FIELDS |= {"factor", "original_max_position_embeddings"}


@dataclass(frozen=True)
class Yarn:
    """YaRN: rotary frequencies for ``factor`` times the ``original_positions``.

    Pairs that turn more than ``beta_fast`` times within the original positions keep their frequency, those that turn
    less than ``beta_slow`` times have it divided by ``factor``, with a ramp in between, whose ends are whole pairs if
    ``truncate``.  Cosines and sines are multiplied by ``attention_factor``.
    """

    factor: float
    original_positions: int
    attention_factor: float
    beta_fast: float = 32
    beta_slow: float = 1
    truncate: bool = True


def read_yarn(rope: dict[str, Any], positions: int, path: Path) -> Yarn | None:
    """Return the YaRN of the rotary part of ``config.json``; Transformers and vLLM read the same fields.

    Args:
        rope: The rotary part.
        positions: ``max_position_embeddings``.
        path: The file, for messages.

    Raises:
        ShapeError: another rotary type, or a field that is missing, unknown or out of its bounds.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", "mrope"):
        return None
    if kind != "yarn":
        raise ShapeError(f"{path}: rotary type {kind!r} is not known; it can be 'mrope', 'default' or 'yarn'")
    # A field that is not computed here could change the angles unseen.
    unknown = sorted(set(rope) - _FIELDS)
    if unknown:
        raise ShapeError(f"{path}: field {unknown[0]!r} of YaRN is not known; remove it")
    options = {name: rope[name] for name in _OPTIONS if rope.get(name) is not None}
    if "factor" not in rope:
        raise ShapeError(f"{path}: field 'factor' is missing")
    factor = rope["factor"]
    original = rope.get("original_max_position_embeddings", positions)
    numbers = {**options, "factor": factor, "original_max_position_embeddings": original}
    for name, value in numbers.items():
        is_allowed = is_number(value) and value > 0 and (name != "factor" or value >= 1)
        if not is_allowed:
            raise ShapeError(f"{path}: field {name!r} of YaRN is {value!r}; give a number above 0, for 'factor' from 1")
    # The temperature of YaRN's paper (arXiv 2309.00071): sqrt(1 / t) = 0.1 ln(factor) + 1.
    options.setdefault("attention_factor", 0.1 * math.log(factor) + 1.0)
    truncate = bool(rope.get("truncate", True))
    return Yarn(factor, original, truncate=truncate, **options)
