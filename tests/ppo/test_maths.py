"""PPO's equations against literal transcriptions in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ovr_megatron.config import StageConfig
from ovr_megatron.ppo.advantages import (
    explained_variance,
    generalised_advantages,
    mean_and_std,
    moments,
    normalise,
    token_rewards,
)
from ovr_megatron.ppo.batch import seeds_of
from ovr_megatron.ppo.curriculum import max_tokens
from ovr_megatron.ppo.losses import policy_loss, value_loss


def ragged(seed: int, count: int = 9) -> tuple[list[float], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 12, size=count)
    return rng.integers(0, 2, size=count).astype(float).tolist(), [rng.normal(size=n) for n in lengths]


def last(scores: list[float], values: list[np.ndarray]) -> list[np.ndarray]:
    return token_rewards(scores, [len(v) for v in values])


def literal_gae(reward: float, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """A_t = sum_k (gamma lam)^k delta_{t+k}, the definition, with nested sums."""
    n = len(values)
    rewards = [0.0] * (n - 1) + [reward]
    following = [*values[1:], 0.0]
    delta = [rewards[t] + gamma * following[t] - values[t] for t in range(n)]
    return np.array([sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)])


@given(st.integers(0, 2**31), st.floats(0.5, 1.0), st.floats(0.0, 1.0))
def test_advantages_are_the_literal_sum(seed: int, gamma: float, lam: float) -> None:
    rewards, values = ragged(seed)
    advantages, returns = generalised_advantages(last(rewards, values), values, gamma, lam)
    for reward, value, advantage, target in zip(rewards, values, advantages, returns, strict=True):
        expected = literal_gae(reward, value, gamma, lam)
        np.testing.assert_allclose(advantage, expected, atol=1e-12)
        np.testing.assert_allclose(target, expected + value, atol=1e-12)


def test_the_papers_advantage_is_reward_minus_value() -> None:
    rewards, values = ragged(3)
    advantages, returns = generalised_advantages(last(rewards, values), values, 1.0, 1.0)
    for reward, value, advantage, target in zip(rewards, values, advantages, returns, strict=True):
        np.testing.assert_allclose(advantage, reward - value, atol=1e-12)
        np.testing.assert_allclose(target, reward, atol=1e-12)


def test_advantages_by_hand() -> None:
    # delta = (0 + 0.5 * 2 - 1, 3 - 2) = (0, 1); A = (0 + 0.5 * 0.5 * 1, 1)
    advantages, returns = generalised_advantages([np.array([0.0, 3.0])], [np.array([1.0, 2.0])], 0.5, 0.5)
    np.testing.assert_allclose(advantages[0], [0.25, 1.0])
    np.testing.assert_allclose(returns[0], [1.25, 3.0])


def test_normalisation_over_ranks_is_that_of_the_whole_batch() -> None:
    _, arrays = ragged(5)
    flat = np.concatenate(arrays)
    mean, std = mean_and_std(moments(arrays[:4]) + moments(arrays[4:]))
    normal = np.concatenate(normalise(arrays, mean, std))
    np.testing.assert_allclose(normal, (flat - flat.mean()) / (flat.std() + 1e-8), atol=1e-12)


def test_explained_variance_of_perfect_and_useless_values() -> None:
    target = [np.array([0.0, 1.0, 1.0, 0.0])]
    perfect = explained_variance(moments([target[0] * 0]), moments(target))
    useless = explained_variance(moments([target[0] - 0.5]), moments(target))
    assert perfect == pytest.approx(1.0)
    assert useless == pytest.approx(0.0)


@given(st.integers(0, 2**31), st.floats(0.05, 0.5))
def test_policy_loss_is_the_clipped_surrogate(seed: int, clip: float) -> None:
    rng = np.random.default_rng(seed)
    new, old, advantage = rng.normal(size=(3, 17))
    found, clipped = policy_loss(*(torch.from_numpy(x) for x in (new, old, advantage)), clip, 2 * clip)
    for i in range(17):
        ratio = np.exp(new[i] - old[i])
        bounded = min(max(ratio, 1 - clip), 1 + 2 * clip)
        assert float(found[i]) == pytest.approx(-min(ratio * advantage[i], bounded * advantage[i]), rel=1e-12)
        assert bool(clipped[i]) == (bounded * advantage[i] < ratio * advantage[i])


def test_on_policy_the_gradient_is_the_policy_gradient() -> None:
    logits = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    actions, advantage = torch.tensor([0, 1, 2, 3, 4, 0]), torch.linspace(-1, 1, 6, dtype=torch.float64)
    logprobs = logits.log_softmax(-1).gather(1, actions[:, None])[:, 0]
    losses, clipped = policy_loss(logprobs, logprobs.detach(), advantage, 0.2, 0.2)
    (found,) = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad(-(logprobs * advantage).sum(), logits)
    assert torch.equal(losses.detach(), -advantage)
    assert not clipped.any()
    torch.testing.assert_close(found, expected)


@given(st.integers(0, 2**31))
def test_value_losses(seed: int) -> None:
    values, returns, old = np.random.default_rng(seed).normal(size=(3, 13))
    tensors = [torch.from_numpy(x) for x in (values, returns, old)]
    np.testing.assert_allclose(value_loss(*tensors, 0.0), (values - returns) ** 2, atol=1e-12)
    bounded = old + np.clip(values - old, -0.2, 0.2)
    expected = 0.5 * np.maximum((values - returns) ** 2, (bounded - returns) ** 2)
    np.testing.assert_allclose(value_loss(*tensors, 0.2), expected, atol=1e-12)


def test_the_papers_curriculum() -> None:
    stages = [StageConfig(until=u, max_tokens=m) for u, m in ((300, 24576), (700, 32768), (900, 49152))]
    assert [max_tokens(stages, i) for i in (0, 299, 300, 699, 700, 899)] == [24576, 24576, 32768, 32768, 49152, 49152]


def test_seeds_of_an_iteration_differ() -> None:
    seeds = [seed for i in range(4) for p in range(16) for seed in seeds_of(1, i, p, 8)]
    assert len(set(seeds)) == len(seeds) == 4 * 16 * 8
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seeds_of(1, 2, 3, 4) == seeds_of(1, 2, 3, 8)[:4] != seeds_of(2, 2, 3, 4)
