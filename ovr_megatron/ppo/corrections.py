"""Corrections for tokens that another distribution drew than the policy that learns, one row each.

The tokens of a rollout come from an engine whose log-probabilities differ from the trainer's, or from older weights.
With mu the distribution that drew a token, as the engine reported it, and pi_old the trainer's policy before the first
update of the iteration, the loss of a token is multiplied by a weight that is a function of

    r_t = pi_old(y_t) / mu(y_t),

without a gradient.  `ovr_megatron.ppo.losses` bounds pi / pi_old, so that behaviour, proximal and current policy stay
apart (Hilton et al. 2021).

A new correction is a new row of `CORRECTIONS`, or `register_correction` before the run starts, or a `Correction` in a
module of the user's that ``algorithm.correction=package.module:NAME`` names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ovr_megatron.config import AlgorithmConfig, ConfigError
from ovr_megatron.ppo.losses import ResponseSegments
from ovr_megatron.runtime.registry import Registry


@dataclass(frozen=True)
class CorrectionInput:
    """The scored tokens of a pack, of which n is the number, and the bounds of the correction.

    Attributes:
        log_ratio: log r_t [n], without a gradient.
        segments: the tokens' responses.
        staleness: float [n], iterations between the weights that drew each token and those before the update; None
            where the current weights drew all of them.
        low: ``algorithm.correction_low``, or the row's own lower bound; 0 without one.
        high: ``algorithm.correction_high``, or the row's own upper bound; infinite without one.
    """

    log_ratio: Tensor
    segments: ResponseSegments
    staleness: Tensor | None
    low: float
    high: float


@dataclass(frozen=True)
class Correction:
    """A correction.

    Attributes:
        weigh: a pure function that returns the weight of each token [n], and sums over the tokens by name, whose means
            are logged as ``rollout/NAME``.  Where it asks `ResponseSegments` for sums it is a collective of the
            context-parallel ranks.
        low: its lower bound where ``algorithm.correction_low`` is 0; None where it takes none.
        high: its upper bound where ``algorithm.correction_high`` is 0; None where it takes none.
        masks: whether tokens beyond the bounds get the weight 0, so that the bounds must enclose 1.
    """

    weigh: Callable[[CorrectionInput], tuple[Tensor, dict[str, Tensor]]]
    low: float | None = None
    high: float | None = None
    masks: bool = False


def _truncate(ratio: Tensor, high: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Return min(ratio, high) [n], and how many were above."""
    # Capped, as one token of tiny probability at the engine would otherwise outweigh all others of a step.
    return ratio.clamp(max=high), {"truncated": (ratio > high).float().sum()}


def _mask(weights: Tensor, inside: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return ``weights`` [n] with 0 where ``inside`` (bool [n]) does not hold, and the number of these."""
    # Filled and not multiplied: an infinite ratio times 0 would be NaN.
    return weights.masked_fill(~inside, 0.0), {"masked": (~inside).float().sum()}


def token_truncate(batch: CorrectionInput) -> tuple[Tensor, dict[str, Tensor]]:
    """Return min(r_t, high): token-level truncated importance sampling (TIS, Yao et al. 2025)."""
    return _truncate(batch.log_ratio.exp(), batch.high)


def token_mask(batch: CorrectionInput) -> tuple[Tensor, dict[str, Tensor]]:
    """Return r_t where r_t <= high, else 0: token-level masked importance sampling (MIS, Liu, Li et al. 2025).

    AReaL bounds the weight of its decoupled objective in this way (``behav_imp_weight_cap``).
    """
    ratio = batch.log_ratio.exp()
    return _mask(ratio, ratio <= batch.high)


def sequence_truncate(batch: CorrectionInput) -> tuple[Tensor, dict[str, Tensor]]:
    """Return min(R, high) with R the product of r_t over the response: sequence-level TIS (Liu, Li et al. 2025)."""
    return _truncate(batch.segments.sum(batch.log_ratio).exp(), batch.high)


def sequence_mask(batch: CorrectionInput) -> tuple[Tensor, dict[str, Tensor]]:
    """Return R where R <= high, else 0, with R the product of r_t over the response: sequence-level MIS."""
    ratio = batch.segments.sum(batch.log_ratio).exp()
    return _mask(ratio, ratio <= batch.high)


def geometric_mask(batch: CorrectionInput) -> tuple[Tensor, dict[str, Tensor]]:
    """Return 1 where low <= G <= high, else 0, with G the geometric mean of r_t over the response.

    It rejects responses and reweighs none (verl, ``rollout_corr_math.md``, section 3.3.3).  Unlike the product, G does
    not grow with the length of a response.
    """
    mean_ratio = batch.segments.mean(batch.log_ratio).exp()
    inside = (mean_ratio >= batch.low) & (mean_ratio <= batch.high)
    return _mask(torch.ones_like(mean_ratio), inside)


def icepop(batch: CorrectionInput) -> tuple[Tensor, dict[str, Tensor]]:
    """Return r_t where low <= r_t <= high, else 0 (IcePop, Ling Team 2025, arXiv 2510.18855)."""
    ratio = batch.log_ratio.exp()
    return _mask(ratio, (ratio >= batch.low) & (ratio <= batch.high))


def decoupled(batch: CorrectionInput) -> tuple[Tensor, dict[str, Tensor]]:
    """Return r_t: the decoupled objective of AReaL without a bound on its weight (Fu et al. 2025, arXiv 2505.24298).

    With ``algorithm.loss=clip`` the loss of a token is -r_t min(u_t A_t, clip(u_t) A_t), u_t = pi / pi_old.
    """
    return batch.log_ratio.exp(), {}


# docs/algorithms.md has the equation and the source of each.
CORRECTIONS = Registry[Correction](
    "algorithm.correction",
    {
        "token_truncate": Correction(token_truncate, high=2.0),
        "token_mask": Correction(token_mask, high=2.0, masks=True),
        "sequence_truncate": Correction(sequence_truncate, high=2.0),
        "sequence_mask": Correction(sequence_mask, high=2.0, masks=True),
        "geometric_mask": Correction(geometric_mask, low=0.999, high=1.001, masks=True),
        "icepop": Correction(icepop, low=0.5, high=5.0, masks=True),
        "decoupled": Correction(decoupled),
    },
    lambda value: value if isinstance(value, Correction) else None,
    f"an {Correction.__module__}.{Correction.__name__}",
)


def register_correction(name: str, correction: Correction) -> None:
    """Let ``algorithm.correction`` take ``name``.

    Raises:
        RegistryError: the name is taken.
    """
    CORRECTIONS.register(name, correction)


def find_correction(name: str) -> Correction:
    """Return the correction that ``algorithm.correction`` names.

    Raises:
        RegistryError: there is none of this name, or the object of this name is no `Correction`.
    """
    return CORRECTIONS.look_up(name)


def correction_bounds(settings: AlgorithmConfig) -> tuple[float, float]:
    """Return the lower and the upper bound of the correction that ``settings`` name: theirs, or else the row's own.

    A correction without the one has 0, without the other infinity.

    Raises:
        RegistryError: as `find_correction`.
        ConfigError: the bounds do not go with the correction, or nothing would be learned.
    """
    name = settings.correction
    assert name is not None
    correction = find_correction(name)
    if settings.correction_low and correction.low is None:
        raise ConfigError(
            f"algorithm.correction_low={settings.correction_low:g}: algorithm.correction={name} has no lower bound; "
            "leave it out, or take icepop or geometric_mask"
        )
    if settings.correction_high and correction.high is None:
        raise ConfigError(
            f"algorithm.correction_high={settings.correction_high:g}: algorithm.correction={name} has no upper bound; "
            "leave it out, or take token_truncate or token_mask"
        )
    low = settings.correction_low or correction.low or 0.0
    high = settings.correction_high or correction.high or math.inf
    if low >= high:
        raise ConfigError(
            f"algorithm.correction={name}: correction_low={low:g} must be below correction_high={high:g}; change one "
            "of them"
        )
    if correction.masks and not low <= 1 <= high:
        raise ConfigError(
            f"algorithm.correction={name} with bounds {low:g} and {high:g} masks every token on which engine and "
            "trainer agree; let algorithm.correction_low be at most 1 and algorithm.correction_high at least 1"
        )
    return low, high
