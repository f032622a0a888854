"""Rotary frequencies of a model: the trainer's, and what vLLM is given, so that both turn by the same angles."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ovr_megatron.model.shape import ModelShape, Yarn


def inverse_frequencies(shape: ModelShape) -> tuple[Tensor, float]:
    """Angles per position, float32 [head_dim / 2] on the CPU, and the factor of cosines and sines.

    They are computed on the CPU wherever they are used: another device's power function may differ in the last bit,
    which at position 40,000 is an angle of a few thousandths.
    """
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32, device="cpu") / shape.head_dim
    periods = shape.rope_theta**exponents
    if shape.yarn is None:
        return 1.0 / periods, 1.0
    kept = _kept(shape, shape.yarn)
    return 1.0 / (shape.yarn.factor * periods) * (1 - kept) + 1.0 / periods * kept, shape.yarn.attention_factor


def _kept(shape: ModelShape, yarn: Yarn) -> Tensor:
    """How much of its frequency each rotary pair keeps, float32 [head_dim / 2]: a ramp from 1 down to 0."""
    first, last = _pair_of(yarn.beta_fast, shape, yarn), _pair_of(yarn.beta_slow, shape, yarn)
    if yarn.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, shape.head_dim - 1)
    pairs = torch.arange(shape.head_dim // 2, dtype=torch.float32, device="cpu")
    return 1 - ((pairs - first) / (last - first if last != first else 0.001)).clamp(0, 1)


def _pair_of(turns: float, shape: ModelShape, yarn: Yarn) -> float:
    """The rotary pair, not rounded, that makes so many ``turns`` within the original positions."""
    logarithm = math.log(yarn.original_positions / (turns * 2 * math.pi))
    return shape.head_dim * logarithm / (2 * math.log(shape.rope_theta))
