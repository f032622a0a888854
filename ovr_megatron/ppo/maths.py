"""The equations of PPO as the paper uses it.  Pure functions, no state, no communication.

Ragged batches are lists of one array per response; n is the number of response tokens.  Token t is an action
taken in the state before it, so values[t] = V(s_t) and the state after the last token is terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Ragged = list[np.ndarray]
Total = Callable[[np.ndarray], np.ndarray]


def token_rewards(scores: Sequence[float], lengths: Sequence[int], penalties: Ragged | None = None) -> Ragged:
    """The score of a response on its last token, less a penalty for each token; float64 [n] per response."""
    rewards = [np.zeros(n) for n in lengths]
    for i, reward in enumerate(rewards):
        if penalties is not None:
            reward -= penalties[i]
        if len(reward):
            reward[-1] += scores[i]
    return rewards


def discounted(rewards: Ragged, factor: float) -> Ragged:
    """G_t = sum over k >= t of factor^(k - t) r_k, the sum from each token on to the end of its response."""
    lengths = np.array([len(r) for r in rewards])
    width = int(lengths.max(initial=0))
    padded = np.zeros((len(rewards), width))
    for row, r in zip(padded, rewards, strict=True):
        row[: len(r)] = r
    sums = np.zeros((len(rewards), width + 1))
    for t in reversed(range(width)):
        sums[:, t] = padded[:, t] + factor * sums[:, t + 1]
    return [row[:n].copy() for row, n in zip(sums, lengths, strict=True)]


def generalised_advantages(rewards: Ragged, values: Ragged, gamma: float, lam: float) -> tuple[Ragged, Ragged]:
    """Generalised advantage estimation with V(terminal) = 0.

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t);  A_t = delta_t + gamma lam A_{t+1};  R_t = A_t + V(s_t)
    (Schulman et al. 2016, eq. 16; the paper takes gamma = lam = 1, so A_t = reward - V(s_t)).

    Args:
        rewards: float [n] per response, of each token.
        values: float [n] per response.
        gamma: discount in (0, 1].
        lam: mixing of n-step estimates in [0, 1].

    Returns:
        Advantages and returns, float64 [n] per response.
    """
    deltas = []
    for r, v in zip(rewards, values, strict=True):
        value = np.asarray(v, np.float64)
        deltas.append(r + gamma * np.append(value[1:], 0.0)[: len(value)] - value)
    advantages = discounted(deltas, gamma * lam)
    returns = [a + v for a, v in zip(advantages, values, strict=True)]
    return advantages, returns


def group_advantages(rewards: Ragged, groups: Sequence[int], divide: bool) -> Ragged:
    """GRPO: A = (R - mean) / (std + 1e-6) over the responses to one prompt, the same for all tokens of a response.

    R is the sum of a response's rewards and std the biased one (Shao et al. 2024, section 4.1.2).  Without ``divide``,
    Dr. GRPO: A = R - mean (Liu et al. 2025, section 3.2).

    Args:
        rewards: float [n] per response.
        groups: number of the prompt of each response.
        divide: by the standard deviation of the group.
    """
    total, names = np.array([r.sum() for r in rewards]), np.asarray(groups)
    advantage = np.zeros(len(total))
    for name in np.unique(names):
        group = total[names == name]
        advantage[names == name] = (group - group.mean()) / (group.std() + 1e-6 if divide else 1.0)
    return [np.full(len(r), a) for r, a in zip(rewards, advantage, strict=True)]


def leave_one_out_advantages(rewards: Ragged, groups: Sequence[int]) -> Ragged:
    """RLOO: A_i = R_i - mean of the other responses to the prompt (Ahmadian et al. 2024, section 2.2)."""
    total, names = np.array([r.sum() for r in rewards]), np.asarray(groups)
    advantage = np.zeros(len(total))
    for name in np.unique(names):
        group = total[names == name]
        others = (group.sum() - group) / max(len(group) - 1, 1)
        advantage[names == name] = group - others
    return [np.full(len(r), a) for r, a in zip(rewards, advantage, strict=True)]


def overlong_penalty(length: int, limit: int, buffer: int) -> float:
    """DAPO's soft punishment (Yu et al. 2025, eq. 13): 0 up to limit - buffer, then linearly down to -1 at the limit.

    ``length`` and ``limit`` are those of the response in tokens; without ``buffer`` it is 0.
    """
    return -min(max(length - (limit - buffer), 0) / buffer, 1.0) if buffer else 0.0


def scaled_reward(verdict: float, wrong: float) -> float:
    """Map a verdict of 0 to 1 linearly onto ``wrong`` to 1; DAPO's rewards are -1 and 1 (Yu et al. 2025, eq. 7)."""
    return wrong + (1.0 - wrong) * verdict


def token_weights(
    reduction: str, lengths: Sequence[int], packs: Sequence[Sequence[int]], constant: int, total: Total
) -> Ragged | None:
    """What to multiply a token's loss by, so that the mean over all tokens of a step is the wanted reduction.

    With N tokens in S responses and P packs in a step of all ranks: every ``token`` 1 (none is returned); every
    response the same (``sequence``, GRPO) N / (S n); a ``constant`` divisor, the length limit of the run (Dr. GRPO) or
    1, which sums over a response (RLOO), N / (S constant); every ``pack`` the same (Open-Reasoner-Zero)
    N / (P n of the pack).

    Args:
        reduction: one of these four.
        lengths: n of every response of this rank.
        packs: the responses in each pack of the step; an empty pack counts nothing.
        constant: tokens by which ``constant`` divides.
        total: sums an array over all ranks.

    Returns:
        float64 [n] per response; those outside ``packs`` stay 0.
    """
    if reduction == "token":
        return None
    members = [i for chosen in packs for i in chosen]
    tokens, responses, number = total(
        np.array([sum(lengths[i] for i in members), len(members), sum(map(bool, packs))], np.float64)
    )
    weights = [np.zeros(n) for n in lengths]
    for chosen in packs:
        whole = sum(lengths[i] for i in chosen)
        for i in chosen:
            divisor = {
                "sequence": responses * lengths[i],
                "constant": responses * constant,
                "pack": number * whole,
            }[reduction]
            weights[i][:] = tokens / divisor
    return weights


def moments(arrays: Ragged) -> np.ndarray:
    """Count, sum and sum of squares over all tokens; additive over ranks."""
    flat = np.concatenate([np.zeros(0), *arrays])
    return np.array([flat.size, flat.sum(), np.square(flat).sum()])


def mean_and_std(total: np.ndarray) -> tuple[float, float]:
    """Mean and (biased) standard deviation from summed `moments`."""
    count, first, second = total
    mean = first / count
    return float(mean), float(np.sqrt(max(second / count - mean * mean, 0.0)))


def normalise(advantages: Ragged, mean: float, std: float) -> Ragged:
    """(A - mean) / (std + 1e-8), with mean and standard deviation over the whole batch of all ranks."""
    return [(a - mean) / (std + 1e-8) for a in advantages]


def explained_variance(error: np.ndarray, target: np.ndarray) -> float:
    """1 - Var(target - value) / Var(target) from summed `moments`; 0 where the targets do not vary."""
    spread = mean_and_std(target)[1] ** 2
    return 1.0 - mean_and_std(error)[1] ** 2 / spread if spread > 1e-12 else 0.0


def policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Clipped surrogate, negated, one number a token.

    -min(rho A, clip(rho, 1 - low, 1 + high) A) with rho = exp(log pi - log pi_old)
    (Schulman et al. 2017, eq. 7; ``high`` over ``low`` is DAPO's clip-higher, Yu et al. 2025, eq. 10).

    Strictly on-policy, ``old`` is ``logprobs.detach()``: rho is exactly 1 and the gradient is the policy gradient.

    Returns:
        Losses [n] and whether each was clipped [n].
    """
    ratio = (logprobs - old).exp()
    free, clipped = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    return -torch.minimum(free, clipped), clipped < free


def kl_estimate(logprobs: Tensor, reference: Tensor, form: str) -> Tensor:
    """Estimate of KL(policy || reference) at sampled tokens (Schulman, "Approximating KL divergence", 2020).

    With d = log pi - log pi_ref: ``k1`` is d, ``k2`` is d^2 / 2, ``k3`` is exp(-d) - 1 + d (GRPO's).
    """
    d = logprobs - reference
    return {"k1": lambda: d, "k2": lambda: d.square() / 2, "k3": lambda: torch.expm1(-d) + d}[form]()


def truncated_importance(old: Tensor, rollout: Tensor, cap: float) -> Tensor:
    """min(pi_old / pi_rollout, cap), for tokens drawn by an engine that computes otherwise (Yao et al. 2025)."""
    return (old - rollout).exp().clamp(max=cap)


def value_loss(values: Tensor, returns: Tensor, old: Tensor, clip: float) -> Tensor:
    """Squared error to the returns, one number a token.

    With ``clip`` above 0, Open-Reasoner-Zero's form: 0.5 max((V - R)^2, (V_old + clip(V - V_old, -clip, clip) - R)^2).
    """
    error = (values - returns) ** 2
    if clip == 0:
        return error
    near = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum(error, (near - returns) ** 2)
