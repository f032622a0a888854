"""A linear softmax policy with responses to two prompts, and the papers' objectives on it, written out as sums."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

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
        self.moved = self.sampler + 0.08 * draw(VOCABULARY, FEATURES)
        self.features = [draw(n, FEATURES) for n in LENGTHS]
        self.actions = [torch.randint(0, VOCABULARY, (n, 1), generator=generator) for n in LENGTHS]
        self.values = [draw(n).numpy() for n in LENGTHS]
        self.teacher = self.sampler + 0.5 * draw(VOCABULARY, FEATURES)

    def logprobs(self, weight: Tensor) -> list[Tensor]:
        pairs = zip(self.features, self.actions, strict=True)
        return [(f @ weight.T).log_softmax(-1).gather(1, a)[:, 0] for f, a in pairs]

    def gradient(self, weight: Tensor, loss: Callable[[list[Tensor]], Tensor]) -> Tensor:
        leaf = weight.clone().requires_grad_()
        loss(self.logprobs(leaf)).backward()
        assert leaf.grad is not None
        return leaf.grad


PROBLEM = Problem()


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


def literal_gae(lam_of_length: Callable[[int], float]) -> list[Tensor]:
    """A_t = sum over k >= t of lam^(k - t) delta_k, gamma = 1, the verdict on the last token; normalised."""
    raw = []
    for reward, values in zip(VERDICTS, PROBLEM.values, strict=True):
        n = len(values)
        following = [*values[1:], 0.0]
        delta = [(reward if t == n - 1 else 0.0) + following[t] - values[t] for t in range(n)]
        lam = lam_of_length(n)
        raw.append(torch.tensor([sum(lam ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]).double())
    return normalised(raw)


def paper_vc_ppo(logprobs: list[Tensor]) -> Tensor:
    """PPO with lambda = 0.95 in the advantages (Yuan 2025); the critic's lambda is not in the policy's gradient."""
    advantages = literal_gae(lambda n: 0.95)
    return sum((-a * p).sum() for a, p in zip(advantages, logprobs, strict=True)) / sum(LENGTHS)


def paper_vapo(logprobs: list[Tensor]) -> Tensor:
    """Length-adaptive GAE, clip-higher, token mean, and mu times the mean NLL of right tokens (Yue 2025)."""
    old = PROBLEM.logprobs(PROBLEM.sampler)
    total = torch.zeros((), dtype=torch.float64)
    for a, p, q in zip(literal_gae(lambda n: max(0.0, 1 - 1 / (0.05 * n))), logprobs, old, strict=True):
        ratio = p.exp() / q.exp()
        total = total - torch.min(ratio * a, ratio.clamp(1 - 0.2, 1 + 0.28) * a).sum()
    right = torch.cat([p for p, verdict in zip(logprobs, VERDICTS, strict=True) if verdict])
    return total / sum(LENGTHS) - 0.1 * right.mean()


def paper_reinforce_pp_baseline(logprobs: list[Tensor]) -> Tensor:
    """(R - mean of the group), normalised over the batch's tokens, and beta d^2 / 2 in the loss (Hu 2025)."""
    reference = PROBLEM.logprobs(PROBLEM.reference)
    raw = []
    for i, n in enumerate(LENGTHS):
        raw.append(torch.full((n,), VERDICTS[i] - np.mean([VERDICTS[k] for k in group(i)]), dtype=torch.float64))
    total = torch.zeros((), dtype=torch.float64)
    for a, p, b in zip(normalised(raw), logprobs, reference, strict=True):
        total = total + (-a * p + 0.01 * (p - b) ** 2 / 2).sum()
    return total / sum(LENGTHS)


def paper_opo(logprobs: list[Tensor]) -> Tensor:
    """Mean over responses of (R - b) log pi(y), b the length-weighted mean of the group (Hao 2025)."""
    total = torch.zeros((), dtype=torch.float64)
    for i, p in enumerate(logprobs):
        baseline = sum(LENGTHS[k] * VERDICTS[k] for k in group(i)) / sum(LENGTHS[k] for k in group(i))
        total = total - (VERDICTS[i] - baseline) * p.sum()
    return total / len(logprobs)


def paper_maxrl(logprobs: list[Tensor]) -> Tensor:
    """Mean over prompts of the mean log pi(y) of the right responses less that of all (Tajwar 2026, Theorem 2)."""
    total = torch.zeros((), dtype=torch.float64)
    for members in (range(0, 3), range(3, 6)):
        sums = torch.stack([logprobs[k].sum() for k in members])
        right = torch.tensor([VERDICTS[k] == 1 for k in members])
        total = total - (sums[right].mean() - sums.mean())
    return total / 2


def group_relative(i: int) -> float:
    """GRPO's advantage."""
    rewards = np.array([VERDICTS[k] for k in group(i)])
    return float((VERDICTS[i] - rewards.mean()) / (rewards.std() + 1e-6))


def paper_cispo(logprobs: list[Tensor]) -> Tensor:
    """Token mean of -sg(clip(rho)) A log pi, no lower bound and 5 as the upper (MiniMax-M1; ScaleRL)."""
    old = PROBLEM.logprobs(PROBLEM.sampler)
    total = torch.zeros((), dtype=torch.float64)
    for i, p in enumerate(logprobs):
        weight = (p.detach().exp() / old[i].exp()).clamp(max=5.0)
        total = total - (weight * group_relative(i) * p).sum()
    return total / sum(LENGTHS)


def paper_gmpo(logprobs: list[Tensor]) -> Tensor:
    """Mean over responses of the geometric mean of |min(rho A, clip(rho) A)| with A's sign (Zhao 2025)."""
    old = PROBLEM.logprobs(PROBLEM.sampler)
    total = torch.zeros((), dtype=torch.float64)
    for i, p in enumerate(logprobs):
        advantage = group_relative(i)
        ratio = p.exp() / old[i].exp()
        bounded = torch.min(ratio * advantage, ratio.clamp(math.exp(-0.4), math.exp(0.4)) * advantage).abs()
        total = total - math.copysign(1, advantage) * bounded.log().mean().exp()
    return total / len(logprobs)


def paper_sapo(logprobs: list[Tensor]) -> Tensor:
    """Mean over responses of the mean of 4 / tau sigmoid(tau (rho - 1)) A, tau = 1 and 1.05 (Gao 2025)."""
    old = PROBLEM.logprobs(PROBLEM.sampler)
    total = torch.zeros((), dtype=torch.float64)
    for i, p in enumerate(logprobs):
        tau = 1.0 if group_relative(i) > 0 else 1.05
        gate = 4 / tau * torch.sigmoid(tau * (p.exp() / old[i].exp() - 1))
        total = total - (gate * group_relative(i)).mean()
    return total / len(logprobs)


def paper_dppo(logprobs: list[Tensor], threshold: float, kl: bool) -> Tensor:
    """Token mean of M rho A, M = 0 beyond the divergence of the binary event (Qi 2026)."""
    old = PROBLEM.logprobs(PROBLEM.sampler)
    total = torch.zeros((), dtype=torch.float64)
    for i, p in enumerate(logprobs):
        now, then = p.detach().exp(), old[i].exp()
        divergence = (now - then).abs()
        if kl:
            divergence = then * (then / now).log() + (1 - then) * ((1 - then) / (1 - now)).log()
        away = (now > then) if group_relative(i) > 0 else (now < then)
        mask = ~(away & (divergence > threshold))
        total = total - (mask * (p.exp() / then) * group_relative(i)).sum()
    return total / sum(LENGTHS)


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
    "VC-PPO": paper_vc_ppo,
    "VAPO": paper_vapo,
    "REINFORCE++-baseline": paper_reinforce_pp_baseline,
    "OPO": paper_opo,
    "MaxRL": paper_maxrl,
    "CISPO": paper_cispo,
    "GMPO": paper_gmpo,
    "SAPO": paper_sapo,
    "DPPO-TV": lambda logprobs: paper_dppo(logprobs, 0.15, kl=False),
    "DPPO-KL": lambda logprobs: paper_dppo(logprobs, 0.05, kl=True),
    "On-policy distillation": paper_distillation,
}
