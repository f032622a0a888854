"""Rewards for each token, returns, and the advantages of every estimator.  Pure functions, no state, no communication.

Ragged batches are lists of one array per response; n is the number of response tokens.  Token t is an action
taken in the state before it, so values[t] = V(s_t) and the state after the last token is terminal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Ragged = list[np.ndarray]


def scaled_reward(verdict: float, wrong: float) -> float:
    """Map a verdict of 0 to 1 linearly onto ``wrong`` to 1; DAPO's rewards are -1 and 1 (Yu et al. 2025, eq. 7)."""
    return wrong + (1.0 - wrong) * verdict


def overlong_penalty(length: int, limit: int, buffer: int) -> float:
    """Return DAPO's soft punishment of length (Yu et al. 2025, eq. 13).

    It is 0 up to limit - buffer and falls linearly to -1 at the limit; without a ``buffer`` it is always 0.

    Args:
        length: tokens of the response.
        limit: most tokens of the response.
        buffer: tokens before the limit over which the penalty grows.
    """
    if not buffer:
        return 0.0
    tokens_in_buffer = max(length - (limit - buffer), 0)
    return -min(tokens_in_buffer / buffer, 1.0)


def cosine_reward(
    verdict: float,
    length: int,
    limit: int,
    right: tuple[float, float],
    wrong: tuple[float, float],
) -> float:
    """Return the length-dependent reward of Yeo et al. (2025, section 4.2), a cosine between two values.

    ``right`` and ``wrong`` are the values of a right and a wrong response without tokens and at the limit; a verdict in
    between is mapped linearly onto the two curves.

    Args:
        verdict: 0 to 1.
        length: tokens of the response.
        limit: most tokens of the response.
        right: of a verdict of 1.
        wrong: of a verdict of 0.
    """
    phase = (1.0 + math.cos(math.pi * length / limit)) / 2  # 1 without tokens, 0 at the limit
    reward_if_right = right[1] + (right[0] - right[1]) * phase
    reward_if_wrong = wrong[1] + (wrong[0] - wrong[1]) * phase
    return reward_if_wrong + (reward_if_right - reward_if_wrong) * verdict


def token_rewards(scores: Sequence[float], lengths: Sequence[int], penalties: Ragged | None = None) -> Ragged:
    """Put each response's score on its last token and subtract a penalty from every token.

    Args:
        scores: reward of each response.
        lengths: n of each response.
        penalties: float [n] per response.

    Returns:
        float64 [n] per response.
    """
    rewards = [np.zeros(n) for n in lengths]
    for i, reward in enumerate(rewards):
        if penalties is not None:
            reward -= penalties[i]
        if len(reward):  # a response may have no tokens
            reward[-1] += scores[i]
    return rewards


def discounted_sums(rewards: Ragged, factor: float | np.ndarray) -> Ragged:
    """Sum from each token to the end of its response: G_t = sum over k >= t of factor^(k - t) r_k, [n] per response.

    Args:
        rewards: float [n] per response, of each token.
        factor: of all responses, or of each, [number of responses].
    """
    count = len(rewards)
    width = max(map(len, rewards), default=0)
    padded = np.zeros((count, width))
    for row, r in zip(padded, rewards, strict=True):
        row[: len(r)] = r
    # G_t = r_t + factor G_{t+1}, for all responses at once; the zeros behind a short response add nothing to it.
    sums = np.zeros((count, width + 1))
    for t in reversed(range(width)):
        sums[:, t] = padded[:, t] + factor * sums[:, t + 1]
    response_sums = []
    for row, r in zip(sums, rewards, strict=True):
        # Copied: a view would keep the padded sums of all responses in memory.
        response_sums.append(row[: len(r)].copy())
    return response_sums


def generalised_advantages(rewards: Ragged, values: Ragged, gamma: float, lam: float | np.ndarray) -> Ragged:
    """Estimate advantages by GAE with V(terminal) = 0.

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t);  A_t = delta_t + gamma lam A_{t+1}
    (Schulman et al. 2016, eq. 16; the paper takes gamma = lam = 1, so A_t = reward - V(s_t)).

    Args:
        rewards: float [n] per response, of each token.
        values: float [n] per response.
        gamma: discount in (0, 1].
        lam: mixing of n-step estimates in [0, 1], of all responses or of each, [number of responses].

    Returns:
        Float64 [n] per response.
    """
    deltas = []
    for r, v in zip(rewards, values, strict=True):
        value = np.asarray(v, np.float64)
        later_values = np.append(value[1:], 0.0)
        next_value = later_values[: len(value)]  # cut, as a response may have no tokens
        deltas.append(r + gamma * next_value - value)
    return discounted_sums(deltas, gamma * lam)


def value_targets(advantages: Ragged, values: Ragged) -> Ragged:
    """Return R_t = A_t + V(s_t), what the critic learns, float64 [n] per response."""
    return [a + v for a, v in zip(advantages, values, strict=True)]


def length_adaptive_lambda(lengths: Sequence[int], alpha: float) -> np.ndarray:
    """Return 1 - 1 / (alpha n) for each response, at least 0 (VAPO, Yue et al. 2025).

    The weights lam^k of the later differences then sum to alpha n: to a share of the response and not to a constant.

    Args:
        lengths: n of each response.
        alpha: share of the response, positive.
    """
    # At least 1: a response of fewer than 1 / alpha tokens has the one-step estimate.
    sums = np.maximum(alpha * np.asarray(lengths, np.float64), 1.0)
    return 1.0 - 1.0 / sums


def group_advantages(rewards: Ragged, groups: Sequence[int], divide: bool) -> Ragged:
    """Compare each response with the others to its prompt, as GRPO and Dr. GRPO do.

    GRPO: A = (R - mean) / (std + 1e-6), the same for all tokens of a response, where R is the sum of a response's
    rewards and std the biased one of the group (Shao et al. 2024, section 4.1.2).  Without ``divide``, Dr. GRPO:
    A = R - mean (Liu et al. 2025, section 3.2).

    Args:
        rewards: float [n] per response.
        groups: index of the prompt of each response.
        divide: by the standard deviation of the group.
    """
    response_rewards = _sum_by_response(rewards)
    prompts = np.asarray(groups)
    advantages = np.zeros(len(rewards))
    for prompt in np.unique(prompts):
        members = prompts == prompt
        group = response_rewards[members]
        scale = 1.0
        if divide:
            # The small term is for a group of equal rewards, whose standard deviation is 0.
            scale = group.std() + 1e-6
        advantages[members] = (group - group.mean()) / scale
    return _repeat_over_tokens(advantages, rewards)


def length_weighted_advantages(rewards: Ragged, groups: Sequence[int]) -> Ragged:
    """Compare each response with the mean reward of a token of the responses to its prompt, as OPO does.

    A_i = R_i - (sum over j of n_j R_j) / (sum over j of n_j): the baseline of least variance where the squared gradient
    of a response grows with its length (Hao et al. 2025).  A group of empty responses has the baseline 0.

    Args:
        rewards: float [n] per response, of each token.
        groups: index of the prompt of each response.
    """
    response_rewards = _sum_by_response(rewards)
    lengths = np.array([len(r) for r in rewards], np.float64)
    prompts = np.asarray(groups)
    advantages = np.zeros(len(rewards))
    for prompt in np.unique(prompts):
        members = prompts == prompt
        group = response_rewards[members]
        baseline = (lengths[members] * group).sum() / max(lengths[members].sum(), 1.0)
        advantages[members] = group - baseline
    return _repeat_over_tokens(advantages, rewards)


def mean_relative_advantages(rewards: Ragged, groups: Sequence[int]) -> Ragged:
    """Divide a response's distance from the mean of its group by that mean, as MaxRL does.

    A = (R - mean) / mean, and 0 where the mean is not above 0 (Tajwar et al. 2026, "Maximum likelihood reinforcement
    learning"): with rewards of 0 and 1 the gradient is that of log p of a prompt, p its share of right responses,
    as far as the group's size resolves it.

    Args:
        rewards: float [n] per response, of each token.
        groups: index of the prompt of each response.
    """
    response_rewards = _sum_by_response(rewards)
    prompts = np.asarray(groups)
    advantages = np.zeros(len(rewards))
    for prompt in np.unique(prompts):
        members = prompts == prompt
        mean = response_rewards[members].mean()
        if mean > 0:
            advantages[members] = (response_rewards[members] - mean) / mean
    return _repeat_over_tokens(advantages, rewards)


def leave_one_out_advantages(rewards: Ragged, groups: Sequence[int]) -> Ragged:
    """Compare each response with the mean of the other responses to its prompt, as RLOO does.

    A_i = R_i - mean over j != i of R_j (Ahmadian et al. 2024, section 2.2).  The only response to a prompt is compared
    with 0.

    Args:
        rewards: float [n] per response.
        groups: index of the prompt of each response.
    """
    response_rewards = _sum_by_response(rewards)
    prompts = np.asarray(groups)
    advantages = np.zeros(len(rewards))
    for prompt in np.unique(prompts):
        members = prompts == prompt
        group = response_rewards[members]
        # At least 1: the only response to a prompt has a sum of 0 over the others, and so the baseline 0.
        divisor = max(len(group) - 1, 1)
        baselines = (group.sum() - group) / divisor
        advantages[members] = group - baselines
    return _repeat_over_tokens(advantages, rewards)


def _sum_by_response(rewards: Ragged) -> np.ndarray:
    return np.array([r.sum() for r in rewards])


def _repeat_over_tokens(advantages: np.ndarray, rewards: Ragged) -> Ragged:
    """Give the advantage of each response to all of its tokens, [n] per response."""
    token_advantages = []
    for advantage, r in zip(advantages, rewards, strict=True):
        token_advantages.append(np.full(len(r), advantage))
    return token_advantages


def moments(arrays: Ragged) -> np.ndarray:
    """Return count, sum and sum of squares over all tokens, float64 [3]; they add up over ranks."""
    flat = np.concatenate([np.zeros(0), *arrays])  # the zeros: a rank may have no responses
    total = flat.sum()
    total_of_squares = np.square(flat).sum()
    return np.array([flat.size, total, total_of_squares])


def mean_and_std(total: np.ndarray) -> tuple[float, float]:
    """Return mean and (biased) standard deviation from summed `moments`."""
    count, first, second = total
    mean = first / count
    variance = second / count - mean * mean
    std = np.sqrt(max(variance, 0.0))  # rounding may leave the variance a little below 0
    return float(mean), float(std)


def normalise(advantages: Ragged, mean: float, std: float) -> Ragged:
    """Return (A - mean) / (std + 1e-8), with mean and standard deviation over the whole batch of all ranks."""
    return [(a - mean) / (std + 1e-8) for a in advantages]


def explained_variance(error: np.ndarray, target: np.ndarray) -> float:
    """Return 1 - Var(target - value) / Var(target) from summed `moments`; 0 where the targets do not vary."""
    _, target_std = mean_and_std(target)
    target_variance = target_std**2
    # A difference of two sums: rounding leaves equal targets a tiny variance, which must not be divided by.
    if target_variance > 1e-12:
        _, error_std = mean_and_std(error)
        return 1.0 - error_std**2 / target_variance
    return 0.0
