"""Losses for each token, divergences, and the weights that reduce them.  Pure functions, no state.

n is the number of scored tokens of a pack, or of response tokens of a response.  A new loss of the policy is a new row
of `LOSSES`, or `register_loss` before the run starts, or a `PolicyLoss` in a module of the user's that
``algorithm.loss=package.module:NAME`` names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from ovr_megatron.config import AlgorithmConfig
from ovr_megatron.ppo.advantages import Ragged
from ovr_megatron.runtime.registry import Registry

SumOverRanks = Callable[[np.ndarray], np.ndarray]


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
# the loss of each token [n], and sums over the tokens by name, whose means are logged as ``policy/NAME``.
PolicyLoss = Callable[[Tensor, Tensor, Tensor, ResponseSegments, AlgorithmConfig], tuple[Tensor, dict[str, Tensor]]]


def clipped_surrogate(ratio: Tensor, advantages: Tensor, settings: AlgorithmConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the negated clipped surrogate of each token, -min(rho A, clip(rho, 1 - clip, 1 + clip_high) A).

    It is eq. 7 of Schulman et al. 2017; ``clip_high`` over ``clip`` is DAPO's clip-higher (Yu et al. 2025, eq. 10).

    Args:
        ratio: rho [n], with a gradient.
        advantages: A [n].
        settings: ``clip`` and ``clip_high``, how far rho may lie below and above 1.

    Returns:
        Losses [n], and the number of clipped tokens as ``clip_fraction``.
    """
    low = settings.clip
    # 0 means as `clip`, so that the plain form needs one setting.
    high = settings.clip_high or settings.clip
    surrogate = ratio * advantages
    clipped_surrogate = ratio.clamp(1 - low, 1 + high) * advantages
    clipped = clipped_surrogate < surrogate
    losses = -torch.minimum(surrogate, clipped_surrogate)
    return losses, {"clip_fraction": clipped.float().sum()}


def clip_loss(
    logprobs: Tensor, old: Tensor, advantages: Tensor, segments: ResponseSegments, settings: AlgorithmConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return PPO's loss, the `clipped_surrogate` of each token's own ratio rho = exp(log pi - log pi_old).

    Strictly on-policy, ``old`` is ``logprobs.detach()``: rho is exactly 1 and the gradient is the policy gradient.
    """
    ratio = (logprobs - old).exp()
    return clipped_surrogate(ratio, advantages, settings)


def gspo_loss(
    logprobs: Tensor, old: Tensor, advantages: Tensor, segments: ResponseSegments, settings: AlgorithmConfig
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


LOSSES = Registry[PolicyLoss](
    "algorithm.loss", {"clip": clip_loss, "gspo": gspo_loss}, lambda value: value if callable(value) else None
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


def token_weights(
    reduction: str, lengths: Sequence[int], packs: Sequence[Sequence[int]], constant: int, sum_over_ranks: SumOverRanks
) -> Ragged | None:
    """Return factors for the tokens' losses that turn the mean over all tokens of a step into the set reduction.

    With N tokens in S responses and P packs in a step of all ranks: every ``token`` 1 (none is returned); every
    response the same (``sequence``, GRPO) N / (S n); a ``constant`` divisor, the length limit of the run (Dr. GRPO) or
    1, which sums over a response (RLOO), N / (S constant); every ``pack`` the same (Open-Reasoner-Zero)
    N / (P n of the pack).

    Args:
        reduction: one of these four.
        lengths: n of every response of this rank.
        packs: the responses in each pack of the step; an empty pack counts nothing.
        constant: tokens by which ``constant`` divides.
        sum_over_ranks: sums an array over all ranks.

    Returns:
        float64 [n] per response; those outside ``packs`` stay 0.
    """
    if reduction == "token":
        return None
    members = list(chain.from_iterable(packs))
    local_tokens = sum(lengths[i] for i in members)
    local_packs = sum(map(bool, packs))  # without the empty ones, which only keep a rank in step
    local_counts = np.array([local_tokens, len(members), local_packs], np.float64)
    # Every rank takes part in the sum, also one without responses in this step.
    token_count, response_count, pack_count = sum_over_ranks(local_counts)
    weights = [np.zeros(n) for n in lengths]
    for pack in packs:
        pack_tokens = sum(lengths[i] for i in pack)
        for i in pack:
            divisor = {
                "sequence": response_count * lengths[i],
                "constant": response_count * constant,
                "pack": pack_count * pack_tokens,
            }[reduction]
            weights[i][:] = token_count / divisor
    return weights
