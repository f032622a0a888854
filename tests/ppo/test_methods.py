"""The rows of docs/algorithms.md against their papers: advantage, loss and gradient, in float64.

A linear softmax policy stands for the model.  Ours: the row's settings through the project's own estimator, token
weights and policy objective.  Theirs: the paper's objective, written out as a sum.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from ovr_megatron.config import AlgorithmConfig, ConfigError, RLConfig, build, defaults
from ovr_megatron.data.packing import blank_pack
from ovr_megatron.model.scores import Scores
from ovr_megatron.ppo.advantages import mean_and_std, moments, normalise, scaled_reward, token_rewards
from ovr_megatron.ppo.estimators import find_estimator
from ovr_megatron.ppo.experience import estimate, shaped_reward
from ovr_megatron.ppo.losses import kl_estimate
from ovr_megatron.ppo.objectives import PolicyObjective
from ovr_megatron.ppo.reductions import positive_nll_weights, token_weights
from tests.ppo.methods import documented_methods
from tests.ppo.papers import (
    BUFFER,
    EARLIER_LIMIT,
    GROUPS,
    LATER_LIMIT,
    LENGTHS,
    LIMIT,
    PAPERS,
    PROBLEM,
    VERDICTS,
    paper_distillation,
)


def settings(name: str, **changes: object) -> AlgorithmConfig:
    values = dict(item.split("=") for item in documented_methods()[name])
    if "overlong_buffer" in values:
        values["overlong_buffer"] = str(BUFFER)
    return build(AlgorithmConfig, OmegaConf.create({**values, **{k: str(v) for k, v in changes.items()}}))


def run_config(algorithm: AlgorithmConfig) -> RLConfig:
    """A run whose curriculum is in its first stage."""
    stages = [{"until": 1, "max_tokens": EARLIER_LIMIT}, {"until": 2, "max_tokens": LATER_LIMIT}]
    values: dict[str, object] = {
        "run": {"dir": "run"},
        "model": {"path": "model"},
        "curriculum": stages,
        "iterations": 2,
    }
    values["data"] = {"max_prompt_tokens": 1}
    chosen = {key: getattr(algorithm, key) for key in vars(algorithm)}
    return build(RLConfig, OmegaConf.merge(defaults(RLConfig), values, {"algorithm": chosen}))


def our_advantages(algorithm: AlgorithmConfig) -> list[np.ndarray]:
    rollout = SimpleNamespace(limit=LIMIT + 5, prompts=SimpleNamespace(sample=lambda prompt: [0] * 5))
    rewards = []
    for group, length, verdict in zip(GROUPS, LENGTHS, VERDICTS, strict=True):
        response = SimpleNamespace(prompt=group, tokens=[0] * length, reward=verdict)
        rewards.append(shaped_reward(response, rollout, algorithm))
    penalties = None
    if algorithm.kl_coefficient and algorithm.kl_in == "reward":
        pairs = zip(PROBLEM.logprobs(PROBLEM.sampler), PROBLEM.logprobs(PROBLEM.reference), strict=True)
        penalties = [algorithm.kl_coefficient * kl_estimate(a, b, algorithm.kl_form).numpy() for a, b in pairs]
    per_token = token_rewards(rewards, LENGTHS, penalties)
    values = PROBLEM.values if algorithm.has_critic else None
    arrays = estimate(algorithm, per_token, GROUPS, values).advantages
    if find_estimator(algorithm.estimator).normalises:
        arrays = normalise(arrays, *mean_and_std(moments(arrays)))
    return arrays


def our_gradient(algorithm: AlgorithmConfig) -> Tensor:
    """One optimizer step's gradient on all responses; the policy has moved where the row takes several steps."""
    packs = [[0, 3, 2], [4, 1, 5]]
    order = [i for pack in packs for i in pack]
    divisor = run_config(algorithm).reduction_tokens
    weights = token_weights(algorithm.reduction, LENGTHS, packs, divisor, lambda total: total)
    old, reference = PROBLEM.logprobs(PROBLEM.sampler), PROBLEM.logprobs(PROBLEM.reference)
    advantages = [torch.from_numpy(a) for a in our_advantages(algorithm)]
    extras = {"advantages": advantages, "rollout_logprobs": old}
    if algorithm.policy_updates > 1:
        extras["old_logprobs"] = old
    if algorithm.kl_coefficient:
        extras["reference_logprobs"] = reference
    if algorithm.teacher:
        extras["teacher_logprobs"] = PROBLEM.logprobs(PROBLEM.teacher)
    if weights is not None:
        extras["weights"] = [torch.from_numpy(w) for w in weights]
    if algorithm.positive_nll:
        right = [verdict == 1 for verdict in VERDICTS]
        likelihood = positive_nll_weights(right, LENGTHS, range(len(LENGTHS)), lambda total: total)
        extras["positive_nll_weights"] = [torch.from_numpy(w) for w in likelihood]

    def loss(logprobs: list[Tensor]) -> Tensor:
        flat = torch.cat([logprobs[i] for i in order])
        scores = Scores(torch.arange(len(flat)), logprobs=flat, entropy=torch.zeros_like(flat))
        bounds = torch.tensor([0, *np.cumsum([LENGTHS[i] for i in order])], dtype=torch.int32)
        arrays = {name: torch.cat([a[i] for i in order]) for name, a in extras.items()}
        pack = replace(blank_pack(rows=len(flat)), cu_seqlens=bounds, extras=arrays)
        sums = PolicyObjective(algorithm)(scores, pack)
        return sums.total / sums.count

    return PROBLEM.gradient(PROBLEM.moved if algorithm.policy_updates > 1 else PROBLEM.sampler, loss)


@pytest.mark.parametrize("name", list(documented_methods()))
def test_a_row_is_its_papers_estimator(name: str) -> None:
    algorithm = settings(name)
    ours = our_gradient(algorithm)
    weight = PROBLEM.moved if algorithm.policy_updates > 1 else PROBLEM.sampler
    theirs = PROBLEM.gradient(weight, PAPERS[name])
    # 1e-6: the small numbers that keep a division from zero
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize("method", ["Dr. GRPO", "PPO"])
def test_a_teacher_adds_its_part_to_any_method(method: str) -> None:
    """With one step both parts are policy gradients, which add up."""
    divisor = sum(LENGTHS) / (len(LENGTHS) * LATER_LIMIT) if method == "Dr. GRPO" else 1.0
    ours = our_gradient(settings(method, teacher="folder", teacher_coefficient=0.3))
    paper = PROBLEM.gradient(PROBLEM.sampler, PAPERS[method])
    teaching = PROBLEM.gradient(PROBLEM.sampler, lambda logprobs: paper_distillation(logprobs, 0.3) * divisor)
    torch.testing.assert_close(ours, paper + teaching, rtol=1e-5, atol=1e-6 * float(paper.abs().max()))


CHANGES = {
    "clip_high": ("DAPO", {"clip_high": 0.2}),
    "wrong_reward": ("DAPO", {"wrong_reward": 0}),
    "overlong_buffer": ("DAPO", {"overlong_buffer": 0}),
    "policy_steps": ("DAPO", {"policy_steps": 1}),
    "reduction": ("RLOO", {"reduction": "sequence", "reduction_tokens": 0}),
    "kl": ("REINFORCE++", {"kl_coefficient": 0}),
    "kl_form": ("GRPO", {"kl_form": "k2"}),
    "loss": ("GSPO", {"loss": "clip"}),
    "clip": ("GSPO", {"clip": 0.2, "clip_high": 0.2}),
    "lam_policy": ("VC-PPO", {"lam_policy": 1}),
    "lam_alpha": ("VAPO", {"lam_alpha": 0}),
    "positive_nll": ("VAPO", {"positive_nll": 0}),
    "k2": ("REINFORCE++-baseline", {"kl_coefficient": 0}),
    "cispo": ("CISPO", {"loss": "clip", "clip": 0.2, "clip_high": 0.2}),
    "gmpo": ("GMPO", {"loss": "clip"}),
    "sapo": ("SAPO", {"sapo_positive": 20}),
    "dppo_tv": ("DPPO-TV", {"clip": 0.01}),
    "dppo_kl": ("DPPO-KL", {"clip": 0.001}),
    "estimator": ("On-policy distillation", {"estimator": "grpo"}),
}


@pytest.mark.parametrize("setting", list(CHANGES))
def test_no_setting_of_a_row_is_idle(setting: str) -> None:
    """A row that names a setting must need it: without it the gradient is another one."""
    name, change = CHANGES[setting]
    ours, other = our_gradient(settings(name)), our_gradient(settings(name, **change))
    cosine = float((ours * other).sum() / ours.norm() / other.norm())
    assert cosine < 0.9999, cosine


@pytest.mark.parametrize("name", ["VC-PPO", "VAPO"])
def test_the_critic_of_a_row_learns_undiscounted_returns(name: str) -> None:
    """With its own lambda of 1 the target of every token is the reward, whatever the policy's lambda."""
    per_token = token_rewards(VERDICTS, LENGTHS)
    returns = estimate(settings(name), per_token, GROUPS, PROBLEM.values).returns
    assert returns is not None
    for target, verdict in zip(returns, VERDICTS, strict=True):
        np.testing.assert_allclose(target, np.full(len(target), verdict), atol=1e-12)


def test_the_constant_divisor_is_the_same_in_every_stage() -> None:
    algorithm = settings("Dr. GRPO")
    assert run_config(algorithm).reduction_tokens == LATER_LIMIT
    assert run_config(settings("RLOO")).reduction_tokens == 1


def test_verdicts_are_mapped_onto_the_wrong_reward() -> None:
    assert [scaled_reward(v, -1.0) for v in (0.0, 0.25, 1.0)] == [-1.0, -0.5, 1.0]
    assert [scaled_reward(v, 0.0) for v in (0.0, 0.25, 1.0)] == [0.0, 0.25, 1.0]


@pytest.mark.parametrize("change", [{"wrong_reward": 1}, {"wrong_reward": math.nan}, {"reduction_tokens": 8}])
def test_idle_or_impossible_settings_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        settings("DAPO", **change)
