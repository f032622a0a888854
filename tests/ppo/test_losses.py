"""The losses of policy and critic against literal transcriptions in float64."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ovr_megatron.config import AlgorithmConfig, ConfigError
from ovr_megatron.ppo.losses import LOSSES, ResponseSegments, check_loss, clip_loss, find_loss, gspo_loss, value_loss
from ovr_megatron.runtime.registry import RegistryError


def segments(lengths: Sequence[int]) -> ResponseSegments:
    """Responses of these lengths, one after the other, all on this rank."""
    return ResponseSegments(
        torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)), len(lengths), lambda own: own
    )


@given(st.integers(0, 2**31), st.floats(0.05, 0.5))
def test_policy_loss_is_the_clipped_surrogate(seed: int, clip: float) -> None:
    rng = np.random.default_rng(seed)
    new, old, advantage = rng.normal(size=(3, 17))
    settings = AlgorithmConfig(clip=clip, clip_high=2 * clip)
    found, sums = clip_loss(*(torch.from_numpy(x) for x in (new, old, advantage)), segments([17]), settings)
    clipped, low, high = 0, 0, 0
    for i in range(17):
        ratio = np.exp(new[i] - old[i])
        bounded = min(max(ratio, 1 - clip), 1 + 2 * clip)
        assert float(found[i]) == pytest.approx(-min(ratio * advantage[i], bounded * advantage[i]), rel=1e-12)
        clipped += bounded * advantage[i] < ratio * advantage[i]
        low += ratio < 1 - clip and advantage[i] < 0
        high += ratio > 1 + 2 * clip and advantage[i] > 0
    assert [float(sums[f"clip_fraction{end}"].sum()) for end in ("", "_low", "_high")] == [clipped, low, high]


def test_on_policy_the_gradient_is_the_policy_gradient() -> None:
    logits = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    actions, advantage = torch.tensor([0, 1, 2, 3, 4, 0]), torch.linspace(-1, 1, 6, dtype=torch.float64)
    logprobs = logits.log_softmax(-1).gather(1, actions[:, None])[:, 0]
    losses, sums = clip_loss(logprobs, logprobs.detach(), advantage, segments([6]), AlgorithmConfig())
    (found,) = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad(-(logprobs * advantage).sum(), logits)
    assert torch.equal(losses.detach(), -advantage)
    assert not sums["clip_fraction"].any()
    torch.testing.assert_close(found, expected)


@given(st.integers(0, 2**31))
def test_value_losses(seed: int) -> None:
    values, returns, old = np.random.default_rng(seed).normal(size=(3, 13))
    tensors = [torch.from_numpy(x) for x in (values, returns, old)]
    np.testing.assert_allclose(value_loss(*tensors, 0.0), (values - returns) ** 2, atol=1e-12)
    bounded = old + np.clip(values - old, -0.2, 0.2)
    expected = 0.5 * np.maximum((values - returns) ** 2, (bounded - returns) ** 2)
    np.testing.assert_allclose(value_loss(*tensors, 0.2), expected, atol=1e-12)


LENGTHS = [1, 7, 30, 4]


def moved_policy() -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities now and before, and an advantage of each token that is one number for each response."""
    generator = torch.Generator().manual_seed(2)
    old = -torch.rand(sum(LENGTHS), dtype=torch.float64, generator=generator)
    new = old + 0.1 * torch.randn(sum(LENGTHS), dtype=torch.float64, generator=generator)
    advantages = torch.tensor([1.0, -0.5, 2.0, -1.0], dtype=torch.float64)
    return new, old, advantages.repeat_interleave(torch.tensor(LENGTHS))


def literal_gspo(new: Tensor, old: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """The negated sum of |y| min(s A, clip(s) A) over responses, s = (pi(y) / pi_old(y))^(1/|y|) (eqs. 5 and 7)."""
    total = torch.zeros((), dtype=torch.float64)
    for p, q, advantage in zip(*(x.split(LENGTHS) for x in (new, old, advantages)), strict=True):
        ratio = (p.sum().exp() / q.sum().exp()) ** (1 / len(p))
        total = total - len(p) * torch.min(ratio * advantage[0], ratio.clamp(1 - low, 1 + high) * advantage[0])
    return total


@pytest.mark.parametrize("clip", [0.001, 0.03, 0.5])
def test_gspo_is_the_surrogate_of_a_responses_own_ratio(clip: float) -> None:
    """Value and gradient, at bounds that clip most responses, some and none."""
    new, old, advantages = moved_policy()
    ours, theirs = new.clone().requires_grad_(), new.clone().requires_grad_()
    losses, sums = gspo_loss(
        ours, old, advantages, segments(LENGTHS), AlgorithmConfig(loss="gspo", clip=clip, clip_high=2 * clip)
    )
    expected = literal_gspo(theirs, old, advantages, clip, 2 * clip)
    torch.testing.assert_close(losses.sum(), expected)
    (gradient,) = torch.autograd.grad(losses.sum(), ours)
    (expected_gradient,) = torch.autograd.grad(expected, theirs)
    torch.testing.assert_close(gradient, expected_gradient)
    clipped = [n for n, part in zip(LENGTHS, gradient.split(LENGTHS), strict=True) if not part.any()]
    assert float(sums["clip_fraction"].sum()) == sum(clipped)
    assert bool(clipped) == (clip < 0.5)


@pytest.mark.parametrize("name", ["gspo", "gmpo"])
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_responses_that_ranks_share(chunks: int, name: str) -> None:
    """Context-parallel ranks have parts of every response; a last one has no token at all."""
    new, old, advantages = moved_policy()
    settings = AlgorithmConfig(loss=name, clip=0.03)
    ids = segments(LENGTHS).ids
    full = new.clone().requires_grad_()
    losses, _ = LOSSES.rows[name](full, old, advantages, segments(LENGTHS), settings)
    losses.sum().backward()
    rank_of_token = torch.arange(len(new)) // 5 % chunks
    parts = [(rank_of_token == rank).nonzero()[:, 0] for rank in range(chunks + 1)]
    totals = torch.zeros(2, len(LENGTHS), dtype=torch.float64)
    for rows in parts:
        shared = ResponseSegments(ids[rows], len(LENGTHS), totals.add_)
        LOSSES.rows[name](new[rows], old[rows], advantages[rows], shared, settings)
    for rows in parts:
        part = new[rows].requires_grad_()
        shared = ResponseSegments(ids[rows], len(LENGTHS), lambda _: totals)
        own, _ = LOSSES.rows[name](part, old[rows], advantages[rows], shared, settings)
        own.sum().backward()
        torch.testing.assert_close(own, losses[rows])
        torch.testing.assert_close(part.grad, full.grad[rows])


@pytest.mark.parametrize("name", list(LOSSES.rows))
def test_on_policy_every_loss_is_the_policy_gradient(name: str) -> None:
    new, _, advantages = moved_policy()
    logprobs = new.clone().requires_grad_()
    settings = AlgorithmConfig(loss=name)
    losses, sums = LOSSES.rows[name](logprobs, logprobs.detach(), advantages, segments(LENGTHS), settings)
    losses.sum().backward()
    torch.testing.assert_close(logprobs.grad, -advantages, rtol=1e-12, atol=0)
    if name not in ("cispo", "sapo"):  # the first has log pi in the place of the ratio, the second 2 / tau times it
        assert torch.equal(losses, -advantages) and torch.equal(logprobs.grad, -advantages)
    if name == "sapo":
        assert sums.keys() == {"gate"} and bool((sums["gate"] == 1).all())
    else:
        assert len(sums) == 3 and not any(values.any() for values in sums.values())


LOW, HIGH, TAU, NEGATIVE_TAU = 0.04, 0.06, 1.5, 2.5


def literal_clip(new: Tensor, old: Tensor, advantage: float) -> Tensor:
    """Dual clip: max(min(rho A, clip(rho) A), c A) for A < 0 (Ye et al. 2020), c = 1.05."""
    total = torch.zeros((), dtype=torch.float64)
    for p, q in zip(new, old, strict=True):
        ratio = p.exp() / q.exp()
        objective = torch.min(ratio * advantage, ratio.clamp(1 - LOW, 1 + HIGH) * advantage)
        if advantage < 0:
            objective = torch.max(objective, torch.tensor(1.05 * advantage, dtype=torch.float64))
        total = total - objective
    return total


def literal_cispo(new: Tensor, old: Tensor, advantage: float) -> Tensor:
    """-sum of sg(clip(rho)) A log pi (MiniMax-M1)."""
    total = torch.zeros((), dtype=torch.float64)
    for p, q in zip(new, old, strict=True):
        weight = min(max(math.exp(float(p.detach()) - float(q)), 1 - LOW), 1 + HIGH)
        total = total - weight * advantage * p
    return total


def literal_gmpo(new: Tensor, old: Tensor, advantage: float) -> Tensor:
    """-|y| A (product of |min(rho A, clip(rho, e^-low, e^high) A) / A|)^(1/|y|), times |y| (Zhao 2025)."""
    product = torch.ones((), dtype=torch.float64)
    for p, q in zip(new, old, strict=True):
        ratio = p.exp() / q.exp()
        clipped = ratio.clamp(math.exp(-LOW), math.exp(HIGH))
        product = product * torch.min(ratio * advantage, clipped * advantage).abs() / abs(advantage)
    return -len(new) * advantage * product ** (1 / len(new))


def literal_sapo(new: Tensor, old: Tensor, advantage: float) -> Tensor:
    """-sum of A 4 / tau / (1 + exp(-tau (rho - 1))) (Gao et al. 2025)."""
    total = torch.zeros((), dtype=torch.float64)
    tau = TAU if advantage > 0 else NEGATIVE_TAU
    for p, q in zip(new, old, strict=True):
        ratio = p.exp() / q.exp()
        total = total - advantage * 4 / tau / (1 + torch.exp(-tau * (ratio - 1)))
    return total


def literal_dppo(new: Tensor, old: Tensor, advantage: float, divergence: Callable[[float, float], float]) -> Tensor:
    """-sum of M rho A, M = 0 where rho has moved with the advantage and the divergence is above its bound."""
    total = torch.zeros((), dtype=torch.float64)
    for p, q in zip(new, old, strict=True):
        ratio = p.exp() / q.exp()
        beyond = divergence(math.exp(q), math.exp(p.detach())) > (HIGH if advantage > 0 else LOW)
        if beyond and ((advantage > 0 and ratio > 1) or (advantage < 0 and ratio < 1)):
            continue
        total = total - ratio * advantage
    return total


def literal_dppo_tv(new: Tensor, old: Tensor, advantage: float) -> Tensor:
    return literal_dppo(new, old, advantage, lambda q, p: abs(p - q))


def literal_dppo_kl(new: Tensor, old: Tensor, advantage: float) -> Tensor:
    return literal_dppo(new, old, advantage, lambda q, p: q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)))


LITERAL: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "clip": literal_clip,
    "cispo": literal_cispo,
    "gmpo": literal_gmpo,
    "sapo": literal_sapo,
    "dppo_tv": literal_dppo_tv,
    "dppo_kl": literal_dppo_kl,
}


@pytest.mark.parametrize("name", list(LITERAL))
@pytest.mark.parametrize("spread", [0.02, 0.15, 0.6])
def test_a_loss_is_its_papers_objective(name: str, spread: float) -> None:
    """Value and gradient of ragged responses; the policy has moved by little, and beyond the bounds."""
    new, old, advantages = moved_policy()
    new = old + spread / 0.1 * (new - old)
    new = torch.minimum(new, torch.tensor(-0.01, dtype=torch.float64))
    ours, theirs = new.clone().requires_grad_(), new.clone().requires_grad_()
    own_numbers = {"clip": {"dual_clip": 1.05}, "sapo": {"sapo_positive": TAU, "sapo_negative": NEGATIVE_TAU}}
    settings = AlgorithmConfig(loss=name, clip=LOW, clip_high=HIGH, **own_numbers.get(name, {}))
    losses, sums = LOSSES.rows[name](ours, old, advantages, segments(LENGTHS), settings)
    parts = zip(*(x.split(LENGTHS) for x in (theirs, old, advantages)), strict=True)
    expected = sum((LITERAL[name](p, q, float(advantage[0])) for p, q, advantage in parts), torch.zeros(()).double())
    torch.testing.assert_close(losses.sum(), expected, rtol=1e-10, atol=1e-10)
    (gradient,) = torch.autograd.grad(losses.sum(), ours)
    (expected_gradient,) = torch.autograd.grad(expected, theirs)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10)
    if name in ("clip", "gmpo", "dppo_tv", "dppo_kl"):
        without = int((gradient == 0).sum())
        assert without == float(sums["clip_fraction"].sum() + sums.get("dual_clip_fraction", torch.zeros(1)).sum())
        ends = sums["clip_fraction_low"].sum() + sums["clip_fraction_high"].sum()
        assert ends == sums["clip_fraction"].sum()
        assert without or spread < 0.1


def by_hand(name: str, ratio: float, old: float, advantage: float, **settings: float) -> tuple[float, float]:
    """Loss and gradient of one token."""
    logprob = torch.tensor([math.log(old * ratio)], dtype=torch.float64, requires_grad=True)
    before, gain = (torch.tensor([x], dtype=torch.float64) for x in (math.log(old), advantage))
    losses, _ = LOSSES.rows[name](logprob, before, gain, segments([1]), AlgorithmConfig(loss=name, **settings))
    losses.sum().backward()
    assert logprob.grad is not None
    return float(losses.detach()), float(logprob.grad)


def test_losses_by_hand() -> None:
    # Without the second bound a token of three times the probability costs 3 x 2, with it at most 2 x 2.
    assert by_hand("clip", 3.0, 0.25, -2.0) == pytest.approx((6, 6))
    assert by_hand("clip", 3.0, 0.25, -2.0, dual_clip=2.0) == pytest.approx((4, 0))
    assert by_hand("gspo", 3.0, 0.25, -2.0, dual_clip=2.0) == pytest.approx((4, 0))
    assert by_hand("clip", 3.0, 0.25, 2.0, dual_clip=2.0) == pytest.approx((-2.4, 0))
    # The weight is 1.2 and not 3, and the gradient stays.
    assert by_hand("cispo", 3.0, 0.25, 2.0) == pytest.approx((-2.4 * math.log(0.75), -2.4))
    # exp(0.4) bounds a ratio of 3 that is wanted, and not one that is not.
    assert by_hand("gmpo", 3.0, 0.25, 1.0, clip=0.4) == pytest.approx((-math.exp(0.4), 0))
    assert by_hand("gmpo", 3.0, 0.25, -1.0, clip=0.4) == pytest.approx((3, 3))
    # sigmoid(2) = 0.8808: 4 x 0.8808, and 4 x 0.8808 x 0.1192 x 3 in the gradient
    assert by_hand("sapo", 3.0, 0.25, 1.0) == pytest.approx((-3.5232, -1.2599), abs=1e-4)
    # From 0.01 to 0.03 the ratio is 3 and the distance 0.02; from 0.5 to 0.7 they are 1.4 and 0.2.
    assert by_hand("dppo_tv", 3.0, 0.01, 1.0, clip=0.15) == pytest.approx((-3, -3))
    assert by_hand("dppo_tv", 1.4, 0.5, 1.0, clip=0.15) == (0, 0)
    assert by_hand("dppo_tv", 1.4, 0.5, -1.0, clip=0.15) == pytest.approx((1.4, 1.4))  # it goes back
    assert by_hand("dppo_tv", 0.6, 0.5, -1.0, clip=0.15) == (0, 0)
    # 0.5 log(0.5 / 0.7) + 0.5 log(0.5 / 0.3) = 0.087
    assert by_hand("dppo_kl", 1.4, 0.5, 1.0, clip=0.09) == pytest.approx((-1.4, -1.4))
    assert by_hand("dppo_kl", 1.4, 0.5, 1.0, clip=0.085) == (0, 0)


def test_a_token_that_is_certain_has_a_finite_divergence() -> None:
    logprobs = torch.tensor([0.0, -1e-9, 0.0], requires_grad=True)
    old = torch.tensor([0.0, 0.0, -0.5])
    settings = AlgorithmConfig(loss="dppo_kl")
    losses, _ = LOSSES.rows["dppo_kl"](logprobs, old, torch.ones(3), segments([3]), settings)
    losses.sum().backward()
    assert logprobs.grad is not None and bool(logprobs.grad.isfinite().all()) and bool(losses.isfinite().all())


@pytest.mark.parametrize("name", ["cispo", "gmpo", "sapo", "dppo_tv", "dppo_kl"])
def test_a_second_bound_is_refused_where_there_is_none(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"dual_clip=3: algorithm.loss={name} has no such bound; take clip or gspo"):
        check_loss(AlgorithmConfig(loss=name, dual_clip=3.0))
    check_loss(AlgorithmConfig(loss="gspo", dual_clip=3.0))
    with pytest.raises(ConfigError, match=r"algorithm.dual_clip=0.5 must be above 1, or 0 .off."):
        AlgorithmConfig(dual_clip=0.5)


def test_numbers_that_nothing_reads_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"algorithm.sapo_negative=2.0 has no effect without algorithm.loss=sapo"):
        AlgorithmConfig(sapo_negative=2.0)
    AlgorithmConfig(loss="sapo", sapo_negative=2.0)
    AlgorithmConfig(loss="my.module:loss", sapo_negative=2.0)
    with pytest.raises(ConfigError, match=r"algorithm.cosine_right=3.0 has no effect without algorithm.length_reward="):
        AlgorithmConfig(cosine_right=3.0)
    AlgorithmConfig(length_reward="cosine", cosine_right=3.0)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "clpi",
            r"algorithm.loss='clpi' is not known \(did you mean clip\?\); choose one of clip, gspo, cispo, gmpo, sapo",
        ),
        ("no.such:loss", "algorithm.loss=no.such:loss: No module named 'no'; is its folder in PYTHONPATH"),
        ("json:loss", r"algorithm.loss=json:loss: .*json.__init__.py has no loss; did you mean json:loads\?"),
        ("json:__name__", "algorithm.loss=json:__name__ is of type str; make it a function"),
    ],
)
def test_an_unknown_loss_is_refused(name: str, says: str) -> None:
    with pytest.raises(RegistryError, match=says):
        find_loss(name)
