"""Every advantage, penalty and reduction against a literal transcription in float64, and one case of each by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ovr_megatron.config import AlgorithmConfig, ConfigError
from ovr_megatron.ppo.advantages import (
    cosine_reward,
    discounted_sums,
    group_advantages,
    leave_one_out_advantages,
    length_weighted_advantages,
    mean_relative_advantages,
    overlong_penalty,
    token_rewards,
)
from ovr_megatron.ppo.batch import balance_prompts
from ovr_megatron.ppo.experience import shaped_reward
from ovr_megatron.ppo.losses import kl_estimate
from ovr_megatron.ppo.reductions import positive_nll_weights, token_weights

SEEDS = st.integers(0, 2**31)


def responses(seed: int) -> tuple[list[np.ndarray], list[int]]:
    """Token rewards of a dozen responses to four prompts, shuffled."""
    rng = np.random.default_rng(seed)
    rewards = [rng.normal(size=n) for n in rng.integers(1, 9, size=12)]
    return rewards, rng.permutation(np.repeat([7, 3, 11, 5], 3)).tolist()


def others(rewards: list[np.ndarray], groups: list[int], i: int) -> list[float]:
    return [sum(r) for k, r in enumerate(rewards) if groups[k] == groups[i] and k != i]


@given(SEEDS)
def test_grpo_and_dr_grpo(seed: int) -> None:
    rewards, groups = responses(seed)
    grpo = group_advantages(rewards, groups, divide=True)
    dr_grpo = group_advantages(rewards, groups, divide=False)
    for i, reward in enumerate(rewards):
        group = [*others(rewards, groups, i), sum(reward)]
        mean = sum(group) / 3
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / 3)
        np.testing.assert_allclose(grpo[i], np.full(len(reward), (sum(reward) - mean) / (std + 1e-6)), atol=1e-9)
        np.testing.assert_allclose(dr_grpo[i], np.full(len(reward), sum(reward) - mean), atol=1e-12)


@given(SEEDS)
def test_rloo(seed: int) -> None:
    rewards, groups = responses(seed)
    for i, found in enumerate(leave_one_out_advantages(rewards, groups)):
        expected = sum(rewards[i]) - sum(others(rewards, groups, i)) / 2
        np.testing.assert_allclose(found, np.full(len(rewards[i]), expected), atol=1e-12)


@given(SEEDS)
def test_opo(seed: int) -> None:
    rewards, groups = responses(seed)
    for i, found in enumerate(length_weighted_advantages(rewards, groups)):
        group = [reward for k, reward in enumerate(rewards) if groups[k] == groups[i]]
        baseline = sum(len(reward) * sum(reward) for reward in group) / sum(map(len, group))
        np.testing.assert_allclose(found, np.full(len(rewards[i]), sum(rewards[i]) - baseline), atol=1e-12)


@given(SEEDS)
def test_maxrl(seed: int) -> None:
    rewards, groups = responses(seed)
    for i, found in enumerate(mean_relative_advantages(rewards, groups)):
        mean = (sum(others(rewards, groups, i)) + sum(rewards[i])) / 3
        expected = sum(rewards[i]) / mean - 1 if mean > 0 else 0.0
        np.testing.assert_allclose(found, np.full(len(rewards[i]), expected), rtol=1e-9, atol=1e-9)


def test_maxrl_is_the_likelihood_of_the_right_responses() -> None:
    """Its mean over a group is the mean score of the right responses less the baseline (Theorem 2 of the paper)."""
    verdicts = [1.0, 0.0, 0.0, 1.0, 0.0]
    rewards = token_rewards(verdicts, [1, 2, 3, 1, 2])
    scores = np.array([0.3, -1.0, 0.7, 2.0, -0.4])  # stand for the gradients of log pi
    advantages = np.array([a[0] for a in mean_relative_advantages(rewards, [0] * 5)])
    expected = np.mean([score for score, verdict in zip(scores, verdicts, strict=True) if verdict]) - scores.mean()
    assert (advantages * scores).mean() == pytest.approx(expected)


@given(SEEDS, st.floats(0.5, 1.0))
def test_reinforce_takes_what_is_still_to_come(seed: int, gamma: float) -> None:
    rewards, _ = responses(seed)
    for reward, found in zip(rewards, discounted_sums(rewards, gamma), strict=True):
        n = len(reward)
        expected = [sum(gamma ** (k - t) * reward[k] for k in range(t, n)) for t in range(n)]
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_estimators_by_hand() -> None:
    rewards = token_rewards([1.0, 0.0, 1.0, 0.0], [2, 1, 1, 3])
    groups = [0, 0, 0, 1]
    assert [r.tolist() for r in rewards] == [[0, 1], [0], [1], [0, 0, 0]]
    # group 0 has the mean 2/3 and the standard deviation sqrt(2)/3
    expected = [1 / math.sqrt(2), -math.sqrt(2), 1 / math.sqrt(2), 0]
    found = group_advantages(rewards, groups, divide=True)
    assert [a[0] for a in found] == pytest.approx(expected, abs=1e-5)
    assert [len(a) for a in found] == [2, 1, 1, 3]
    found = group_advantages(rewards, groups, divide=False)
    assert [a[0] for a in found] == pytest.approx([1 / 3, -2 / 3, 1 / 3, 0])
    found = leave_one_out_advantages(rewards, groups)
    assert [a[0] for a in found] == pytest.approx([1 / 2, -1, 1 / 2, 0])
    found = length_weighted_advantages(rewards, groups)  # (2 * 1 + 1 * 0 + 1 * 1) / 4 = 3/4
    assert [a[0] for a in found] == pytest.approx([1 / 4, -3 / 4, 1 / 4, 0])
    found = mean_relative_advantages(rewards, groups)  # 1 / (2/3) - 1; the second prompt has no right response
    assert [a[0] for a in found] == pytest.approx([1 / 2, -1, 1 / 2, 0])
    penalties = [np.array([0.25, 0.5]), np.zeros(1), np.zeros(1), np.zeros(3)]
    rewards = token_rewards([1.0, 0.0, 1.0, 0.0], [2, 1, 1, 3], penalties)
    assert discounted_sums(rewards, 0.5)[0] == pytest.approx([-0.25 + 0.5 * 0.5, 0.5])


@given(SEEDS)
def test_divergences(seed: int) -> None:
    new, old = np.random.default_rng(seed).normal(size=(2, 15))
    tensors = torch.from_numpy(new), torch.from_numpy(old)
    literal = {"k1": new - old, "k2": 0.5 * (new - old) ** 2, "k3": np.exp(old - new) - 1 - (old - new)}
    for form, expected in literal.items():
        np.testing.assert_allclose(kl_estimate(*tensors, form), expected, atol=1e-12)


def test_divergences_estimate_the_divergence() -> None:
    """Their means over draws from the policy are KL(policy || reference), k2's nearly."""
    generator = torch.Generator().manual_seed(1)
    policy = torch.randn(6, dtype=torch.float64, generator=generator).mul(0.3).log_softmax(0)
    reference = torch.randn(6, dtype=torch.float64, generator=generator).mul(0.3).log_softmax(0)
    truth = float((policy.exp() * (policy - reference)).sum())
    for form, within in (("k1", 1e-12), ("k3", 1e-12), ("k2", 0.1 * truth)):
        found = float((policy.exp() * kl_estimate(policy, reference, form)).sum())
        assert found == pytest.approx(truth, abs=within)


def test_overlong_penalty_by_hand() -> None:
    found = [overlong_penalty(n, 100, 20) for n in (0, 80, 85, 100, 120)]
    assert found == pytest.approx([0.0, 0.0, -0.25, -1.0, -1.0])
    assert overlong_penalty(100, 100, 0) == 0.0


def literal_cosine(t: float, limit: float, at_limit: float, at_start: float) -> float:
    """CosFn of arXiv 2502.03373: eta_min + (eta_max - eta_min) (1 + cos(t pi / T)) / 2."""
    return at_limit + 0.5 * (at_start - at_limit) * (1 + np.cos(t * np.pi / limit))


def test_the_cosine_reward_is_that_of_its_paper() -> None:
    right, wrong = (2.0, 1.0), (-10.0, 0.0)
    for length in (0, 1, 37, 50, 99, 100):
        reward_if_right = literal_cosine(length, 100, right[1], right[0])
        reward_if_wrong = literal_cosine(length, 100, wrong[1], wrong[0])
        assert cosine_reward(1.0, length, 100, right, wrong) == pytest.approx(reward_if_right)
        assert cosine_reward(0.0, length, 100, right, wrong) == pytest.approx(reward_if_wrong)
        blended = 0.25 * reward_if_right + 0.75 * reward_if_wrong
        assert cosine_reward(0.25, length, 100, right, wrong) == pytest.approx(blended)
    # By hand: the ends and the middle.
    values = [cosine_reward(1.0, n, 100, right, wrong) for n in (0, 50, 100)]
    assert values == pytest.approx([2.0, 1.5, 1.0])
    values = [cosine_reward(0.0, n, 100, right, wrong) for n in (0, 50, 100)]
    assert values == pytest.approx([-10.0, -5.0, 0.0])


@pytest.mark.parametrize("stopped", [True, False])
def test_the_cosine_takes_the_place_of_the_verdict(stopped: bool) -> None:
    algorithm = AlgorithmConfig(length_reward="cosine")
    rollout = SimpleNamespace(limit=105, prompts=SimpleNamespace(sample=lambda prompt: [0] * 5))
    response = SimpleNamespace(prompt=0, tokens=[0] * 50, reward=1.0, stopped=stopped)
    assert shaped_reward(response, rollout, algorithm) == pytest.approx(1.5 if stopped else -10.0)
    with pytest.raises(ConfigError, match=r"takes the place of algorithm\.wrong_reward=-1"):
        AlgorithmConfig(length_reward="cosine", wrong_reward=-1.0)


@pytest.mark.parametrize("reduction", ["token", "sequence", "constant", "pack"])
def test_weights_give_the_reduction(reduction: str) -> None:
    """Two ranks of three and two responses; the engine divides by all tokens of both."""
    rng = np.random.default_rng(3)
    losses = [[rng.normal(size=n) for n in (3, 5, 2)], [rng.normal(size=n) for n in (7, 1)]]
    layouts = [[[0, 2], [1]], [[1, 0]]]
    told = [
        np.array([sum(map(len, mine)), len(mine), len(layout)], np.float64)
        for mine, layout in zip(losses, layouts, strict=True)
    ]
    total = 0.0
    for mine, layout, own in zip(losses, layouts, told, strict=True):
        lengths = [len(loss) for loss in mine]

        def over_ranks(found: np.ndarray, own: np.ndarray = own) -> np.ndarray:
            np.testing.assert_array_equal(found, own)
            return sum(told)

        weights = token_weights(reduction, lengths, layout, 10, over_ranks)
        total += sum(float((w * loss).sum()) for w, loss in zip(weights or np.ones(9), mine, strict=False))
    every = [loss for mine in losses for loss in mine]
    packs = [
        np.concatenate([mine[i] for i in chosen])
        for mine, layout in zip(losses, layouts, strict=True)
        for chosen in layout
    ]
    expected = {
        "token": np.concatenate(every).mean(),
        "sequence": np.mean([loss.mean() for loss in every]),
        "constant": sum(loss.sum() for loss in every) / (5 * 10),
        "pack": np.mean([p.mean() for p in packs]),
    }[reduction]
    assert total / 18 == pytest.approx(expected, rel=1e-12)


def test_weights_leave_out_what_is_in_no_pack() -> None:
    weights = token_weights("sequence", [2, 3], [[1]], 10, lambda found: found)
    assert [w.tolist() for w in weights] == [[0, 0], [1, 1, 1]]


def test_weights_of_the_right_responses() -> None:
    """Two ranks; the mean over all tokens of weight times loss is the mean over those of right responses."""
    rng = np.random.default_rng(4)
    losses = [[rng.normal(size=n) for n in (3, 5, 2)], [rng.normal(size=n) for n in (7, 1, 4)]]
    right = [[True, False, True], [False, True, True]]
    members = [[0, 1, 2], [0, 1]]  # the last response is in no pack of the step
    sums = [np.array([10.0, 5.0]), np.array([8.0, 1.0])]
    total = 0.0
    for rank in range(2):

        def over_ranks(found: np.ndarray, own: np.ndarray = sums[rank]) -> np.ndarray:
            np.testing.assert_array_equal(found, own)
            return sum(sums)

        weights = positive_nll_weights(right[rank], [len(loss) for loss in losses[rank]], members[rank], over_ranks)
        total += sum(float((w * loss).sum()) for w, loss in zip(weights, losses[rank], strict=True))
    expected = np.concatenate([losses[0][0], losses[0][2], losses[1][1]]).mean()
    assert total / 18 == pytest.approx(expected, rel=1e-12)
    nothing_right = positive_nll_weights([False], [3], [0], lambda found: found)
    assert [w.tolist() for w in nothing_right] == [[0, 0, 0]]


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=60), st.integers(1, 8))
def test_prompts_are_dealt_evenly(costs: list[int], ranks: int) -> None:
    owner = balance_prompts(dict(enumerate(costs)), ranks)
    numbers = [list(owner.values()).count(r) for r in range(ranks)]
    sums = [sum(c for i, c in enumerate(costs) if owner[i] == r) for r in range(ranks)]
    assert sorted(owner) == list(range(len(costs)))
    assert max(numbers) - min(numbers) <= 1
    assert max(sums) - min(sums) <= 2 * max(costs)
