"""The rows of docs/algorithms.md against their papers: advantage, loss and gradient, in float64.

A linear softmax policy stands for the model.  Ours: the row's settings through the project's own estimator, token
weights and policy objective.  Theirs: the paper's objective, written out as a sum.
"""

import math
from collections.abc import Callable
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
from ovr_megatron.ppo.losses import kl_estimate, token_weights
from ovr_megatron.ppo.objectives import PolicyObjective
from tests.ppo.methods import documented_methods

VOCABULARY, FEATURES = 6, 4
LIMIT, BUFFER = 40, 16  # of a response, in tokens; the page's buffer of 4,096 is shortened with the responses
GROUPS = [0, 0, 0, 1, 1, 1]
LENGTHS = [3, 40, 7, 33, 12, 28]
VERDICTS = [1.0, 1.0, 0.0, 0.0, 1.0, 0.0]
EARLIER_LIMIT, LATER_LIMIT = 30, LIMIT


class Problem:
    """Six responses to two prompts under a policy that has moved since it sampled them, and a reference."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        self.sampler = draw(VOCABULARY, FEATURES)
        self.reference = self.sampler + 0.3 * draw(VOCABULARY, FEATURES)
        self.teacher = self.sampler + 0.5 * draw(VOCABULARY, FEATURES)
        self.moved = self.sampler + 0.08 * draw(VOCABULARY, FEATURES)
        self.features = [draw(n, FEATURES) for n in LENGTHS]
        self.actions = [torch.randint(0, VOCABULARY, (n, 1), generator=generator) for n in LENGTHS]
        self.values = [draw(n).numpy() for n in LENGTHS]

    def logprobs(self, weight: Tensor) -> list[Tensor]:
        pairs = zip(self.features, self.actions, strict=True)
        return [(f @ weight.T).log_softmax(-1).gather(1, a)[:, 0] for f, a in pairs]

    def gradient(self, weight: Tensor, loss: Callable[[list[Tensor]], Tensor]) -> Tensor:
        leaf = weight.clone().requires_grad_()
        loss(self.logprobs(leaf)).backward()
        assert leaf.grad is not None
        return leaf.grad


PROBLEM = Problem()


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

    def loss(logprobs: list[Tensor]) -> Tensor:
        flat = torch.cat([logprobs[i] for i in order])
        scores = Scores(torch.arange(len(flat)), logprobs=flat, entropy=torch.zeros_like(flat))
        bounds = torch.tensor([0, *np.cumsum([LENGTHS[i] for i in order])], dtype=torch.int32)
        arrays = {name: torch.cat([a[i] for i in order]) for name, a in extras.items()}
        pack = replace(blank_pack(rows=len(flat)), cu_seqlens=bounds, extras=arrays)
        sums = PolicyObjective(algorithm)(scores, pack)
        return sums.total / sums.count

    return PROBLEM.gradient(PROBLEM.moved if algorithm.policy_updates > 1 else PROBLEM.sampler, loss)


def group(i: int) -> list[int]:
    return [k for k in range(len(GROUPS)) if GROUPS[k] == GROUPS[i]]


def normalised(arrays: list[Tensor]) -> list[Tensor]:
    everything = torch.cat(arrays)
    return [(a - everything.mean()) / everything.std(unbiased=False) for a in arrays]


def paper_ppo(logprobs: list[Tensor]) -> Tensor:
    """Open-Reasoner-Zero with gamma = lambda = 1: A_t = R - V(s_t), normalised; mean over all tokens of rho A."""
    raw = [r - torch.from_numpy(v) for r, v in zip(VERDICTS, PROBLEM.values, strict=True)]
    terms = [(-a * (p - p.detach()).exp()).sum() for a, p in zip(normalised(raw), logprobs, strict=True)]
    return sum(terms) / sum(LENGTHS)


def paper_reinforce_pp(logprobs: list[Tensor]) -> Tensor:
    """A_t = r - beta sum over k >= t of log(pi_k / pi_ref,k), normalised over the batch (Hu 2025)."""
    old, reference = PROBLEM.logprobs(PROBLEM.sampler), PROBLEM.logprobs(PROBLEM.reference)
    raw = []
    for r, a, b in zip(VERDICTS, old, reference, strict=True):
        raw.append(torch.stack([r - 0.01 * (a - b)[t:].sum() for t in range(len(a))]))
    return sum((-a * p).sum() for a, p in zip(normalised(raw), logprobs, strict=True)) / sum(LENGTHS)


def paper_rloo(logprobs: list[Tensor]) -> Tensor:
    """(1 / k) sum_i (R_i - mean of the others) grad log pi(y_i), log pi(y) the sum over y (Ahmadian 2024, eq. 6)."""
    total = torch.zeros((), dtype=torch.float64)
    for i, p in enumerate(logprobs):
        others = [VERDICTS[k] for k in group(i) if k != i]
        total = total - (VERDICTS[i] - sum(others) / len(others)) * p.sum()
    return total / len(logprobs)


def paper_grpo(logprobs: list[Tensor]) -> Tensor:
    """Mean over responses of the mean over tokens of rho A - beta k3 (Shao 2024, eqs. 3 and 4)."""
    reference = PROBLEM.logprobs(PROBLEM.reference)
    total = torch.zeros((), dtype=torch.float64)
    for i, p in enumerate(logprobs):
        rewards = np.array([VERDICTS[k] for k in group(i)])
        advantage = (VERDICTS[i] - rewards.mean()) / (rewards.std() + 1e-6)
        ratio = reference[i].exp() / p.exp()
        divergence = ratio - torch.log(ratio) - 1
        total = total - ((p - p.detach()).exp() * advantage - 0.04 * divergence).mean()
    return total / len(logprobs)


def paper_dr_grpo(logprobs: list[Tensor]) -> Tensor:
    """Sum over tokens by the largest number of tokens, R less the mean, no deviation (Liu 2025, section 3.2)."""
    total = torch.zeros((), dtype=torch.float64)
    for i, p in enumerate(logprobs):
        advantage = VERDICTS[i] - np.mean([VERDICTS[k] for k in group(i)])
        total = total - ((p - p.detach()).exp() * advantage).sum() / LATER_LIMIT
    return total / len(logprobs)


def paper_dapo(logprobs: list[Tensor]) -> Tensor:
    """Token mean of the surrogate clipped at 0.8 and 1.28, rewards of -1 and 1 and eq. 13 (Yu 2025, eqs. 8 to 13)."""

    def punishment(n: int) -> float:
        if n <= LIMIT - BUFFER:
            return 0.0
        return ((LIMIT - BUFFER) - n) / BUFFER if n <= LIMIT else -1.0

    rewards = [(1 if v else -1) + punishment(n) for v, n in zip(VERDICTS, LENGTHS, strict=True)]
    old = PROBLEM.logprobs(PROBLEM.sampler)
    total = torch.zeros((), dtype=torch.float64)
    for i, p in enumerate(logprobs):
        own = np.array([rewards[k] for k in group(i)])
        advantage = (rewards[i] - own.mean()) / (own.std() + 1e-6)
        ratio = p.exp() / old[i].exp()
        total = total - torch.min(ratio * advantage, ratio.clamp(1 - 0.2, 1 + 0.28) * advantage).sum()
    return total / sum(LENGTHS)


def paper_gspo(logprobs: list[Tensor]) -> Tensor:
    """Mean over responses of min(s A, clip(s, 1 - 3e-4, 1 + 4e-4) A), s the n-th root of the ratio (Zheng 2025, eq. 5).

    s is the geometric mean of the tokens' ratios (eq. 7), and its gradient goes through all of them.
    """
    old = PROBLEM.logprobs(PROBLEM.sampler)
    total = torch.zeros((), dtype=torch.float64)
    for i, p in enumerate(logprobs):
        rewards = np.array([VERDICTS[k] for k in group(i)])
        advantage = (VERDICTS[i] - rewards.mean()) / (rewards.std() + 1e-6)
        ratio = (p.sum().exp() / old[i].sum().exp()) ** (1 / len(p))
        total = total - torch.min(ratio * advantage, ratio.clamp(1 - 3e-4, 1 + 4e-4) * advantage)
    return total / len(logprobs)


def paper_distillation(logprobs: list[Tensor], coefficient: float = 1.0) -> Tensor:
    """Mean over tokens of -rho A with A_t = -(log pi_sampler - log pi_teacher) of the token alone (Lu 2025)."""
    pairs = zip(PROBLEM.logprobs(PROBLEM.sampler), PROBLEM.logprobs(PROBLEM.teacher), logprobs, strict=True)
    total = torch.zeros((), dtype=torch.float64)
    for sampled, teacher, p in pairs:
        for t in range(len(p)):
            ratio = torch.exp(p[t] - sampled[t])
            total = total + coefficient * ratio * (sampled[t] - teacher[t])
    return total / sum(LENGTHS)


PAPERS = {
    "PPO": paper_ppo,
    "REINFORCE++": paper_reinforce_pp,
    "RLOO": paper_rloo,
    "GRPO": paper_grpo,
    "Dr. GRPO": paper_dr_grpo,
    "DAPO": paper_dapo,
    "GSPO": paper_gspo,
    "On-policy distillation": paper_distillation,
}


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
    "estimator": ("On-policy distillation", {"estimator": "grpo"}),
}


@pytest.mark.parametrize("setting", list(CHANGES))
def test_no_setting_of_a_row_is_idle(setting: str) -> None:
    """A row that names a setting must need it: without it the gradient is another one."""
    name, change = CHANGES[setting]
    ours, other = our_gradient(settings(name)), our_gradient(settings(name, **change))
    cosine = float((ours * other).sum() / ours.norm() / other.norm())
    assert cosine < 0.9999, cosine


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
