"""A pack of responses that behaviour, proximal and current policy give different probabilities, for tests/ppo."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from ovr_megatron.config import AlgorithmConfig
from ovr_megatron.data.packing import blank_pack
from ovr_megatron.model.scores import Scores
from ovr_megatron.ppo.objectives import PolicyObjective

LENGTHS = [1, 7, 30, 4, 9]


class OffPolicy:
    """Float64 log-probabilities [n] of the tokens of responses of `LENGTHS`, and their advantages.

    Attributes:
        mu: of the distribution that drew them.
        old: of the policy before the update.
        new: of the policy that learns.
        staleness: iterations between the first two.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)

        def draw(scale: float) -> Tensor:
            return scale * torch.randn(sum(LENGTHS), dtype=torch.float64, generator=generator)

        self.mu = -1 - draw(0.3).abs()
        # The first response by nearly the same policy, the last one by another: all sides of every bound occur.
        spread = torch.tensor([0.01, 0.3, 0.5, 0.05, 0.9], dtype=torch.float64).repeat_interleave(torch.tensor(LENGTHS))
        self.old = self.mu + spread * draw(1.0)
        self.new = self.old + draw(0.2)
        self.advantages = draw(1.0)
        self.staleness = torch.arange(sum(LENGTHS), dtype=torch.float64) % 3

    def objective(
        self,
        settings: AlgorithmConfig,
        rows: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
        extras: Sequence[str] = ("old_logprobs",),
    ) -> tuple[float, Tensor, dict[str, float]]:
        """Return the project's loss, its gradient by `new` at ``rows`` (all), and its sums.

        Args:
            settings: the objective's.
            rows: int64, those that a context-parallel rank has.
            group: the context-parallel ranks.
            extras: ``old_logprobs`` and ``staleness``, where the pack has them.
        """
        arrays = {"old_logprobs": self.old, "staleness": self.staleness}
        extra_arrays = {"advantages": self.advantages, "rollout_logprobs": self.mu} | {n: arrays[n] for n in extras}
        bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
        pack = replace(blank_pack(rows=sum(LENGTHS)), cu_seqlens=bounds, extras=extra_arrays)
        rows = torch.arange(sum(LENGTHS)) if rows is None else rows
        leaf = self.new[rows].requires_grad_()
        objective = PolicyObjective(settings, group)
        result = objective(Scores(rows, logprobs=leaf, entropy=torch.zeros_like(leaf)), pack)
        result.total.backward()
        return float(result.total.detach()), leaf.grad, {name: float(value) for name, value in result.sums.items()}


def chunked_rows(rank: int, ranks: int) -> Tensor:
    """Return the rows of a rank: chunks of three, so that it has a part of most responses."""
    rows = torch.arange(sum(LENGTHS))
    return rows[rows // 3 % ranks == rank]


def largest_difference_on_ranks(settings: AlgorithmConfig) -> float:
    """Return how far gradients on the ranks of the world, each with a part of every response, are from those on one.

    A collective.
    """
    problem = OffPolicy()
    rows = chunked_rows(dist.get_rank(), dist.get_world_size())
    _, part, _ = problem.objective(settings, rows, dist.group.WORLD)
    _, full, _ = problem.objective(settings)
    difference = (part - full[rows]).abs().max()
    dist.all_reduce(difference, dist.ReduceOp.MAX)
    return float(difference)
