"""Losses for each token, divergences, and the weights that reduce them.  Pure functions, no state, no communication.

n is the number of scored tokens of a pack, or of response tokens of a response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from ovr_megatron.ppo.advantages import Ragged

SumOverRanks = Callable[[np.ndarray], np.ndarray]


def policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return the negated clipped surrogate of each token.

    -min(rho A, clip(rho, 1 - low, 1 + high) A) with rho = exp(log pi - log pi_old)
    (Schulman et al. 2017, eq. 7; ``high`` over ``low`` is DAPO's clip-higher, Yu et al. 2025, eq. 10).

    Strictly on-policy, ``old`` is ``logprobs.detach()``: rho is exactly 1 and the gradient is the policy gradient.

    Args:
        logprobs: log pi [n], with a gradient.
        old: log pi_old [n].
        advantages: A [n].
        low: how far rho may lie below 1.
        high: how far rho may lie above 1.

    Returns:
        Losses [n] and whether each was clipped [n].
    """
    ratio = (logprobs - old).exp()
    surrogate = ratio * advantages
    clipped_surrogate = ratio.clamp(1 - low, 1 + high) * advantages
    return -torch.minimum(surrogate, clipped_surrogate), clipped_surrogate < surrogate


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


def truncated_importance(old: Tensor, rollout: Tensor, cap: float) -> Tensor:
    """Return min(pi_old / pi_rollout, cap) [n] from log-probabilities (Yao et al. 2025).

    It corrects for tokens that were drawn by an engine whose probabilities differ from the trainer's.
    """
    return (old - rollout).exp().clamp(max=cap)


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
    local_packs = sum(map(bool, packs))
    # Every rank takes part in the sum, also one without responses in this step.
    totals = sum_over_ranks(np.array([local_tokens, len(members), local_packs], np.float64))
    token_count, response_count, pack_count = totals
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
