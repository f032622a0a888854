"""The equations of PPO as the paper uses it.  Pure functions, no state, no communication.

Ragged batches are lists of one array per response; n is the number of response tokens.  Token t is an action
taken in the state before it, so values[t] = V(s_t) and the state after the last token is terminal.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Ragged = list[np.ndarray]


def generalised_advantages(rewards: Sequence[float], values: Ragged, gamma: float, lam: float) -> tuple[Ragged, Ragged]:
    """Generalised advantage estimation with the reward on the last token and V(terminal) = 0.

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t);  A_t = delta_t + gamma lam A_{t+1};  R_t = A_t + V(s_t)
    (Schulman et al. 2016, eq. 16; the paper takes gamma = lam = 1, so A_t = reward - V(s_t)).

    Args:
        rewards: one per response.
        values: float [n] per response.
        gamma: discount in (0, 1].
        lam: mixing of n-step estimates in [0, 1].

    Returns:
        Advantages and returns, float64 [n] per response.
    """
    lengths = np.array([len(v) for v in values])
    width = int(lengths.max(initial=0))
    value = np.zeros((len(values), width + 1))
    reward = np.zeros((len(values), width))
    for i, v in enumerate(values):
        value[i, : len(v)] = v
        if len(v):
            reward[i, len(v) - 1] = rewards[i]
    advantage = np.zeros((len(values), width + 1))
    for t in reversed(range(width)):
        delta = reward[:, t] + gamma * value[:, t + 1] - value[:, t]
        advantage[:, t] = np.where(t < lengths, delta + gamma * lam * advantage[:, t + 1], 0.0)
    advantages = [advantage[i, :n].copy() for i, n in enumerate(lengths)]
    returns = [a + v for a, v in zip(advantages, values, strict=True)]
    return advantages, returns


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


def policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Clipped surrogate, negated, one number a token.

    -min(rho A, clip(rho, 1 - eps, 1 + eps) A) with rho = exp(log pi - log pi_old).

    Strictly on-policy, ``old`` is ``logprobs.detach()``: rho is exactly 1 and the gradient is the policy gradient.

    Returns:
        Losses [n] and whether each was clipped [n].
    """
    ratio = (logprobs - old).exp()
    free, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return -torch.minimum(free, clipped), clipped < free


def value_loss(values: Tensor, returns: Tensor, old: Tensor, clip: float) -> Tensor:
    """Squared error to the returns, one number a token.

    With ``clip`` above 0, Open-Reasoner-Zero's form: 0.5 max((V - R)^2, (V_old + clip(V - V_old, -clip, clip) - R)^2).
    """
    error = (values - returns) ** 2
    if clip == 0:
        return error
    near = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum(error, (near - returns) ** 2)
