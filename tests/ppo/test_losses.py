"""The losses of policy and critic against literal transcriptions in float64."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ovr_megatron.config import AlgorithmConfig
from ovr_megatron.ppo.losses import ResponseSegments, clip_loss, find_loss, gspo_loss, value_loss
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
    clipped = 0
    for i in range(17):
        ratio = np.exp(new[i] - old[i])
        bounded = min(max(ratio, 1 - clip), 1 + 2 * clip)
        assert float(found[i]) == pytest.approx(-min(ratio * advantage[i], bounded * advantage[i]), rel=1e-12)
        clipped += bounded * advantage[i] < ratio * advantage[i]
    assert float(sums["clip_fraction"]) == clipped


def test_on_policy_the_gradient_is_the_policy_gradient() -> None:
    logits = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    actions, advantage = torch.tensor([0, 1, 2, 3, 4, 0]), torch.linspace(-1, 1, 6, dtype=torch.float64)
    logprobs = logits.log_softmax(-1).gather(1, actions[:, None])[:, 0]
    losses, sums = clip_loss(logprobs, logprobs.detach(), advantage, segments([6]), AlgorithmConfig())
    (found,) = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad(-(logprobs * advantage).sum(), logits)
    assert torch.equal(losses.detach(), -advantage)
    assert sums["clip_fraction"] == 0
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
    assert float(sums["clip_fraction"]) == sum(clipped)
    assert bool(clipped) == (clip < 0.5)


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_gspo_of_responses_that_ranks_share(chunks: int) -> None:
    """Context-parallel ranks have parts of every response; a last one has no token at all."""
    new, old, advantages = moved_policy()
    settings = AlgorithmConfig(loss="gspo", clip=0.03)
    ids = segments(LENGTHS).ids
    full = new.clone().requires_grad_()
    losses, _ = gspo_loss(full, old, advantages, segments(LENGTHS), settings)
    losses.sum().backward()
    rank_of_token = torch.arange(len(new)) // 5 % chunks
    parts = [(rank_of_token == rank).nonzero()[:, 0] for rank in range(chunks + 1)]
    totals = torch.zeros(2, len(LENGTHS), dtype=torch.float64)
    for rows in parts:
        ResponseSegments(ids[rows], len(LENGTHS), totals.add_).mean((new - old)[rows])
    for rows in parts:
        part = new[rows].requires_grad_()
        own, _ = gspo_loss(
            part, old[rows], advantages[rows], ResponseSegments(ids[rows], len(LENGTHS), lambda _: totals), settings
        )
        own.sum().backward()
        torch.testing.assert_close(own, losses[rows])
        torch.testing.assert_close(part.grad, full.grad[rows])


def test_on_policy_gspo_is_the_policy_gradient() -> None:
    new, _, advantages = moved_policy()
    logprobs = new.clone().requires_grad_()
    losses, sums = gspo_loss(logprobs, logprobs.detach(), advantages, segments(LENGTHS), AlgorithmConfig(loss="gspo"))
    losses.sum().backward()
    assert torch.equal(losses, -advantages) and torch.equal(logprobs.grad, -advantages)
    assert sums["clip_fraction"] == 0


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("clpi", r"algorithm.loss='clpi' is not known \(did you mean clip\?\); choose one of clip, gspo, or write"),
        ("no.such:loss", "algorithm.loss=no.such:loss: No module named 'no'; is its folder in PYTHONPATH"),
        ("json:loss", r"algorithm.loss=json:loss: .*json.__init__.py has no loss; did you mean json:loads\?"),
        ("json:__name__", "algorithm.loss=json:__name__ is of type str; make it a function"),
    ],
)
def test_an_unknown_loss_is_refused(name: str, says: str) -> None:
    with pytest.raises(RegistryError, match=says):
        find_loss(name)
