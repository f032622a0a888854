"""The equations of PPO's advantages against literal transcriptions in float64."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovr_megatron.ppo.advantages import (
    explained_variance,
    length_adaptive_lambda,
    mean_and_std,
    moments,
    normalise,
    token_rewards,
)
from ovr_megatron.ppo.estimators import Estimate, EstimatorInput, find_estimator


def ragged(seed: int, count: int = 9) -> tuple[list[float], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 12, size=count)
    return rng.integers(0, 2, size=count).astype(float).tolist(), [rng.normal(size=n) for n in lengths]


def last(scores: list[float], values: list[np.ndarray]) -> list[np.ndarray]:
    return token_rewards(scores, [len(v) for v in values])


def gae(
    rewards: list[np.ndarray],
    values: list[np.ndarray],
    gamma: float,
    lam: float,
    lam_critic: float | None = None,
    lam_alpha: float = 0.0,
) -> Estimate:
    batch = EstimatorInput(rewards, [0] * len(values), values, gamma, lam, lam_critic, lam_alpha)
    return find_estimator("gae").compute(batch)


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
    advantages, returns = gae(last(rewards, values), values, gamma, lam)
    for reward, value, advantage, target in zip(rewards, values, advantages, returns, strict=True):
        expected = literal_gae(reward, value, gamma, lam)
        np.testing.assert_allclose(advantage, expected, atol=1e-12)
        np.testing.assert_allclose(target, expected + value, atol=1e-12)


def test_the_papers_advantage_is_reward_minus_value() -> None:
    rewards, values = ragged(3)
    advantages, returns = gae(last(rewards, values), values, 1.0, 1.0)
    for reward, value, advantage, target in zip(rewards, values, advantages, returns, strict=True):
        np.testing.assert_allclose(advantage, reward - value, atol=1e-12)
        np.testing.assert_allclose(target, reward, atol=1e-12)


def test_advantages_by_hand() -> None:
    # delta = (0 + 0.5 * 2 - 1, 3 - 2) = (0, 1); A = (0 + 0.5 * 0.5 * 1, 1)
    advantages, returns = gae([np.array([0.0, 3.0])], [np.array([1.0, 2.0])], 0.5, 0.5)
    np.testing.assert_allclose(advantages[0], [0.25, 1.0])
    np.testing.assert_allclose(returns[0], [1.25, 3.0])


@given(st.integers(0, 2**31), st.floats(0.5, 1.0), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_policy_and_critic_have_a_lambda_each(seed: int, gamma: float, lam: float, lam_critic: float) -> None:
    rewards, values = ragged(seed)
    advantages, returns = gae(last(rewards, values), values, gamma, lam, lam_critic)
    for reward, value, advantage, target in zip(rewards, values, advantages, returns, strict=True):
        np.testing.assert_allclose(advantage, literal_gae(reward, value, gamma, lam), atol=1e-12)
        np.testing.assert_allclose(target, literal_gae(reward, value, gamma, lam_critic) + value, atol=1e-12)


@given(st.integers(0, 2**31), st.floats(0.5, 1.0), st.floats(0.05, 2.0), st.sampled_from([0.7, 0.9]))
def test_the_policys_lambda_goes_by_the_length(seed: int, gamma: float, alpha: float, lam_critic: float) -> None:
    rewards, values = ragged(seed)
    advantages, returns = gae(last(rewards, values), values, gamma, 0.7, lam_critic, alpha)
    for reward, value, advantage, target in zip(rewards, values, advantages, returns, strict=True):
        lam = max(0.0, 1 - 1 / (alpha * len(value)))
        np.testing.assert_allclose(advantage, literal_gae(reward, value, gamma, lam), atol=1e-12)
        np.testing.assert_allclose(target, literal_gae(reward, value, gamma, lam_critic) + value, atol=1e-12)


def test_lambdas_by_hand() -> None:
    # delta = (1 * 2 - 1, 3 - 2) = (1, 1); the policy's A = (1 + 0.5 * 1, 1), the critic's (1 + 1, 1), R = A + V
    advantages, returns = gae([np.array([0.0, 3.0])], [np.array([1.0, 2.0])], 1.0, 0.5, 1.0)
    assert advantages[0].tolist() == [1.5, 1.0] and returns[0].tolist() == [3.0, 3.0]
    # 1 / (0.05 * 40) = 1/2, and of 20 tokens or fewer lambda is 0
    np.testing.assert_allclose(length_adaptive_lambda([40, 20, 10, 0, 2000], 0.05), [0.5, 0.0, 0.0, 0.0, 0.99])


def test_equal_lambdas_change_no_bit() -> None:
    rewards, values = ragged(11)
    plain = gae(last(rewards, values), values, 0.99, 0.95)
    same = gae(last(rewards, values), values, 0.99, 0.95, 0.95)
    for ours, theirs in zip(plain.advantages + plain.returns, same.advantages + same.returns, strict=True):
        assert ours.tobytes() == theirs.tobytes()


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
