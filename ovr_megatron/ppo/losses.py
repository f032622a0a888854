"""Losses for each token, and divergences.  Pure functions, no state.

n is the number of scored tokens of a pack.  A new loss of the policy is a new row
of `LOSSES`, or `register_loss` before the run starts, or a `PolicyLoss` in a module of the user's that
``algorithm.loss=package.module:NAME`` names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ovr_megatron.config import AlgorithmConfig, ConfigError
from ovr_megatron.runtime.registry import Registry


@dataclass(frozen=True)
class ResponseSegments:
    """The responses that the scored tokens of a pack belong to.

    Attributes:
        ids: int64 [n], the index in the pack of each token's response.
        count: responses of the pack.
        sum_over_ranks: sums a tensor over the context-parallel ranks, each of which has a part of every response.
    """

    ids: Tensor
    count: int
    sum_over_ranks: Callable[[Tensor], Tensor]

    def mean(self, values: Tensor) -> Tensor:
        """Return for each token the mean of ``values`` over all tokens of its response, [n], without a gradient.

        A collective of the context-parallel ranks: all of them call it equally often, also one without tokens.
        """
        sums, counts = self._totals(values)
        # A response without tokens has the mean 0 / 0, which no token takes.
        means = sums / counts
        return means[self.ids].to(values.dtype)

    def sum(self, values: Tensor) -> Tensor:
        """Return for each token the sum of ``values`` over all tokens of its response, [n], without a gradient.

        A collective of the context-parallel ranks, as `mean`.
        """
        sums, _ = self._totals(values)
        return sums[self.ids].to(values.dtype)

    def _totals(self, values: Tensor) -> Tensor:
        """Return the sum of ``values`` over each response and its number of tokens, float64 [2, count].  A collective.

        Both travel together, in one collective.
        """
        # In float64: the sum over 100,000 tokens must not lose the small differences that a ratio is made of.
        ones = torch.ones_like(values, dtype=torch.float64)
        terms = torch.stack([values.detach().double(), ones])
        local_totals = torch.zeros(2, self.count, dtype=torch.float64, device=values.device)
        local_totals.index_add_(1, self.ids, terms)
        return self.sum_over_ranks(local_totals)


# Takes log pi [n] with a gradient, log pi_old [n], advantages [n], the tokens' responses, and the settings; returns
# the loss of each token [n], and statistics by name, whose means over the tokens are logged as ``policy/NAME``: a value
# of each token [n], which is logged for each source, too, or their sum, a scalar.
PolicyLoss = Callable[[Tensor, Tensor, Tensor, ResponseSegments, AlgorithmConfig], tuple[Tensor, dict[str, Tensor]]]


def clip_bounds(settings: AlgorithmConfig) -> tuple[float, float]:
    """Return ``clip`` and ``clip_high``; 0 means as ``clip``, so that the plain form needs one setting."""
    return settings.clip, settings.clip_high or settings.clip


def clip_statistics(low: Tensor, high: Tensor) -> dict[str, Tensor]:
    """Return 1 for each token that is clipped, else 0, [n]: at either bound, at the lower one and at the upper one.

    Args:
        low: bool [n], whether the ratio of the token has fallen below its bound.
        high: bool [n], whether it has risen above its bound.
    """
    return {
        "clip_fraction": (low | high).float(),
        "clip_fraction_low": low.float(),
        "clip_fraction_high": high.float(),
    }


def clipped_surrogate(ratio: Tensor, advantages: Tensor, settings: AlgorithmConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the negated clipped surrogate of each token, -min(rho A, clip(rho, 1 - clip, 1 + clip_high) A).

    It is eq. 7 of Schulman et al. 2017; ``clip_high`` over ``clip`` is DAPO's clip-higher (Yu et al. 2025, eq. 10).
    With ``dual_clip`` c the loss of a token with A < 0 is at most -c A (dual-clip PPO, Ye et al. 2020).

    Args:
        ratio: rho [n], with a gradient.
        advantages: A [n].
        settings: ``clip`` and ``clip_high``, how far rho may lie below and above 1, and ``dual_clip``.

    Returns:
        Losses [n], and `clip_statistics`, with ``dual_clip`` also ``dual_clip_fraction``, 1 for a token at its bound.
    """
    low, high = clip_bounds(settings)
    surrogate = ratio * advantages
    clipped_surrogate = ratio.clamp(1 - low, 1 + high) * advantages
    clipped = clipped_surrogate < surrogate
    losses = -torch.minimum(surrogate, clipped_surrogate)
    statistics = clip_statistics(clipped & (advantages < 0), clipped & (advantages > 0))
    if settings.dual_clip:
        bounds = -settings.dual_clip * advantages
        bounded = (advantages < 0) & (losses > bounds)
        losses = torch.where(bounded, bounds, losses)
        statistics["dual_clip_fraction"] = bounded.float()
    return losses, statistics


def clip_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    segments: ResponseSegments,
    settings: AlgorithmConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return PPO's loss, the `clipped_surrogate` of each token's own ratio rho = exp(log pi - log pi_old).

    Strictly on-policy, ``old`` is ``logprobs.detach()``: rho is exactly 1 and the gradient is the policy gradient.
    """
    ratio = (logprobs - old).exp()
    return clipped_surrogate(ratio, advantages, settings)


def gspo_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    segments: ResponseSegments,
    settings: AlgorithmConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return GSPO's loss, the `clipped_surrogate` of one ratio for all tokens of a response.

    s = exp(mean over the response of log pi - log pi_old), and the ratio of a token is sg(s) pi / sg(pi), where sg
    stops the gradient: the value of s with the gradient of the token's own log-probability (GSPO-token, Zheng et al.
    2025, eqs. 7 and 14).  Where all tokens of a response have one advantage, its mean over the response is GSPO's
    objective and its gradient (eq. 5), which needs ``algorithm.reduction=sequence``.  A collective, see
    `ResponseSegments.mean`.
    """
    sequence_ratio = segments.mean(logprobs - old).exp()
    # The gradient stays on the token's own rank: a gradient through s would have to cross the context-parallel ranks.
    token_ratio = (logprobs - logprobs.detach()).exp()
    ratio = sequence_ratio * token_ratio
    return clipped_surrogate(ratio, advantages, settings)


def cispo_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    segments: ResponseSegments,
    settings: AlgorithmConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return CISPO's loss, -sg(clip(rho, 1 - clip, 1 + clip_high)) A log pi (MiniMax-M1, 2025).

    The weight is clipped and not the loss, so that no token is without a gradient.
    """
    low, high = clip_bounds(settings)
    ratio = (logprobs - old).detach().exp()
    weights = ratio.clamp(1 - low, 1 + high)
    return -weights * advantages * logprobs, clip_statistics(weights > ratio, weights < ratio)


def gmpo_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    segments: ResponseSegments,
    settings: AlgorithmConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return GMPO's loss: the geometric mean of a response's clipped ratios takes the place of its tokens' ratios.

    With d = log pi - log pi_old, d' = min(d, clip_high) where A > 0, else max(d, -clip), and g = exp(mean over the
    response of d'), the loss of a token is -sg(g) A exp(d') / sg(exp(d')).  Where all tokens of a response have one
    advantage, its mean over the response is GMPO's objective and its gradient (Zhao et al. 2025), which needs
    ``algorithm.reduction=sequence``.  A collective, see `ResponseSegments.mean`.
    """
    low, high = clip_bounds(settings)
    difference = logprobs - old
    clipped = torch.where(advantages > 0, difference.clamp(max=high), difference.clamp(min=-low))
    geometric_mean = segments.mean(clipped).exp()
    # The gradient stays on the token's own rank, as that of `gspo_loss`; a clipped token has none.
    token_ratio = (clipped - clipped.detach()).exp()
    statistics = clip_statistics(clipped > difference, clipped < difference)
    return -geometric_mean * token_ratio * advantages, statistics


def sapo_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    segments: ResponseSegments,
    settings: AlgorithmConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return SAPO's loss, -4 / tau sigmoid(tau (rho - 1)) A (Gao et al. 2025).

    tau is ``sapo_positive`` where A > 0, else ``sapo_negative``.  The gradient is that of rho A times
    4 p (1 - p), p the sigmoid: 1 at rho = 1 and falling on both sides, whose mean is logged as ``gate``.
    """
    ratio = (logprobs - old).exp()
    temperatures = torch.where(advantages > 0, settings.sapo_positive, settings.sapo_negative).to(ratio.dtype)
    openings = torch.sigmoid(temperatures * (ratio - 1))
    gates = (4 * openings * (1 - openings)).detach()
    return -4 / temperatures * openings * advantages, {"gate": gates}


def dppo_tv_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    segments: ResponseSegments,
    settings: AlgorithmConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of DPPO with the total variation of the binary event that the token is drawn, |pi - pi_old|.

    See `_divergence_masked`, and Qi et al. 2026, "Rethinking the trust region in LLM reinforcement learning".
    """
    divergences = (logprobs.exp() - old.exp()).abs()
    return _divergence_masked(logprobs, old, advantages, divergences, settings)


def dppo_kl_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    segments: ResponseSegments,
    settings: AlgorithmConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of DPPO with the divergence of the binary event that the token is drawn.

    It is KL(pi_old || pi) = pi_old log(pi_old / pi) + (1 - pi_old) log((1 - pi_old) / (1 - pi)); see `dppo_tv_loss`.
    """
    old_rest = _rest(old)
    divergences = old.exp() * (old - logprobs) + old_rest * (old_rest.log() - _rest(logprobs).log())
    return _divergence_masked(logprobs, old, advantages, divergences, settings)


def _rest(logprobs: Tensor) -> Tensor:
    """Return 1 - pi [n], at least 1e-8: a token that is certain would have an infinite divergence."""
    return (-torch.expm1(logprobs)).clamp(min=1e-8)


def _divergence_masked(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    divergences: Tensor,
    settings: AlgorithmConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return -rho A [n], but 0 for the tokens that have left the trust region in the direction of their advantage.

    These are those with A > 0, rho > 1 and a divergence above ``clip_high``, and those with A < 0, rho < 1 and a
    divergence above ``clip``.

    Args:
        logprobs: log pi [n], with a gradient.
        old: log pi_old [n].
        advantages: A [n].
        divergences: of pi from pi_old [n].
        settings: ``clip`` and ``clip_high``.
    """
    low, high = clip_bounds(settings)
    ratio = (logprobs - old).exp()
    risen = (advantages > 0) & (ratio > 1) & (divergences > high)
    fallen = (advantages < 0) & (ratio < 1) & (divergences > low)
    return -(ratio * advantages).masked_fill(risen | fallen, 0.0), clip_statistics(fallen, risen)


# docs/algorithms.md has the equation and the source of each.
LOSSES = Registry[PolicyLoss](
    "algorithm.loss",
    {
        "clip": clip_loss,
        "gspo": gspo_loss,
        "cispo": cispo_loss,
        "gmpo": gmpo_loss,
        "sapo": sapo_loss,
        "dppo_tv": dppo_tv_loss,
        "dppo_kl": dppo_kl_loss,
    },
    lambda value: value if callable(value) else None,
)


def register_loss(name: str, loss: PolicyLoss) -> None:
    """Let ``algorithm.loss`` take ``name``.

    Raises:
        RegistryError: the name is taken.
    """
    LOSSES.register(name, loss)


def find_loss(name: str) -> PolicyLoss:
    """Return the policy's loss that ``algorithm.loss`` names.

    Raises:
        RegistryError: there is none of this name, or the object of this name is no function.
    """
    return LOSSES.look_up(name)


def check_loss(settings: AlgorithmConfig) -> None:
    """Refuse a loss that there is not, and a second bound of the ratio that the loss does not have.

    Raises:
        RegistryError: as `find_loss`.
        ConfigError: ``dual_clip`` would have no effect.
    """
    loss = find_loss(settings.loss)
    # A loss of the user's may read the setting.
    if settings.dual_clip and settings.loss in LOSSES.rows and loss not in (clip_loss, gspo_loss):
        raise ConfigError(
            f"algorithm.dual_clip={settings.dual_clip:g}: algorithm.loss={settings.loss} has no such bound; take clip "
            "or gspo, or leave it out"
        )


def value_loss(values: Tensor, returns: Tensor, old: Tensor, clip: float) -> Tensor:
    """Return the squared error [n] of ``values`` to ``returns``.

    With ``clip`` above 0, Open-Reasoner-Zero's form: 0.5 max((V - R)^2, (V_old + clip(V - V_old, -clip, clip) - R)^2).
    """
    error = (values - returns) ** 2
    if clip == 0:
        return error
    clipped_values = old + (values - old).clamp(-clip, clip)
    clipped_error = (clipped_values - returns) ** 2
    return 0.5 * torch.maximum(error, clipped_error)


def kl_estimate(logprobs: Tensor, reference: Tensor, form: str) -> Tensor:
    """Estimate KL(policy || reference) at sampled tokens, [n] (Schulman, "Approximating KL divergence", 2020).

    With d = log pi - log pi_ref: ``k1`` is d, ``k2`` is d^2 / 2, ``k3`` is exp(-d) - 1 + d (GRPO's).

    Raises:
        KeyError: ``form`` is none of these.
    """
    d = logprobs - reference
    if form == "k1":
        return d
    if form == "k2":
        return d.square() / 2
    if form == "k3":
        return torch.expm1(-d) + d  # expm1: exp(-d) - 1 would lose the digits of a small d
    raise KeyError(form)
