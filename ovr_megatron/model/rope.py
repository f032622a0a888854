"""Rotary frequencies of a model, the same for the trainer and for vLLM, so that both rotate by the same angles."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ovr_megatron.families import ModelShape
from ovr_megatron.families.yarn import Yarn


def inverse_frequencies(shape: ModelShape) -> tuple[Tensor, float]:
    """Return the angles per position, float32 [head_dim / 2] on the CPU, and the factor of cosines and sines.

    They are computed on the CPU wherever they are used: another device's power function may differ in the last bit,
    which at position 40,000 is an angle of a few thousandths.
    """
    even_columns = torch.arange(
        0,
        shape.head_dim,
        2,
        dtype=torch.float32,
        device="cpu",
    )
    exponents = even_columns / shape.head_dim
    periods = shape.rope_theta**exponents
    original = 1.0 / periods
    if shape.yarn is None:
        return original, 1.0
    yarn = shape.yarn
    extrapolation = _extrapolation_share(shape, yarn)
    stretched_periods = yarn.factor * periods
    stretched = 1.0 / stretched_periods
    interpolation = 1 - extrapolation
    frequencies = stretched * interpolation + original * extrapolation
    return frequencies, yarn.attention_factor


def _extrapolation_share(shape: ModelShape, yarn: Yarn) -> Tensor:
    """Return the share of its original frequency for each rotary pair, float32 [head_dim / 2]: a ramp from 1 to 0."""
    first = _pair_with_turns(yarn.beta_fast, shape, yarn)
    last = _pair_with_turns(yarn.beta_slow, shape, yarn)
    if yarn.truncate:
        first = math.floor(first)
        last = math.ceil(last)
    first = max(first, 0)
    last = min(last, shape.head_dim - 1)
    # On the CPU, as in `inverse_frequencies`.
    pair_count = shape.head_dim // 2
    pairs = torch.arange(pair_count, dtype=torch.float32, device="cpu")
    length = last - first
    if length == 0:
        length = 0.001  # a ramp of length 0 is a step
    ramp = (pairs - first) / length
    return 1 - ramp.clamp(0, 1)


def _pair_with_turns(turns: float, shape: ModelShape, yarn: Yarn) -> float:
    """Return the rotary pair, not rounded, that makes so many ``turns`` within the original positions."""
    angle = turns * 2 * math.pi
    logarithm = math.log(yarn.original_positions / angle)
    log_base = 2 * math.log(shape.rope_theta)
    return shape.head_dim * logarithm / log_base
