"""Log-probabilities and entropy over a vocabulary-parallel head, in chunks, logits recomputed in backward.

Shapes: n scored tokens, D model width, V vocabulary rows of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BANNED = -1.0e30
_CHUNK = 1024


def _logits(hidden: Tensor, weight: Tensor, banned: Tensor, scale: float) -> Tensor:
    """Float32 logits [n, V] divided by the temperature; banned columns so low that their probability is exactly 0."""
    return ((hidden @ weight.t()).float() * scale).masked_fill_(banned, BANNED)


def _local_targets(labels: Tensor, rows: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Labels as rows of this rank (0 where they live elsewhere) and the mask of those that live here."""
    local = labels - group.rank() * rows
    here = (local >= 0) & (local < rows)
    return torch.where(here, local, 0), here


class _VocabParallelScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        banned: Tensor,
        scale: float,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropies, norms = [], [], []
        for rows, targets in zip(hidden.split(_CHUNK), labels.split(_CHUNK), strict=True):
            logits = _logits(rows, weight, banned, scale)
            peak = logits.max(dim=-1).values
            dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
            local, here = _local_targets(targets, weight.size(0), group)
            weights = (logits - peak[:, None]).exp_()
            sums = torch.stack(
                (
                    weights.sum(-1),
                    (weights * logits).sum(-1),
                    logits.gather(1, local[:, None])[:, 0] * here,
                )
            )
            dist.all_reduce(sums, group=group)
            total, weighted, target = sums
            norm = peak + total.log()
            norms.append(norm)
            logprobs.append(target - norm)
            entropies.append(norm - weighted / total)
        logprob, entropy, norm = torch.cat(logprobs), torch.cat(entropies), torch.cat(norms)
        ctx.save_for_backward(hidden, weight, labels, banned, norm, entropy)
        ctx.scale, ctx.group = scale, group
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, banned, norm, entropy = ctx.saved_tensors
        d_logprob, d_entropy = grads
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), _CHUNK):
            part = slice(start, start + _CHUNK)
            logits = _logits(hidden[part], weight, banned, ctx.scale) - norm[part, None]
            probs = logits.exp()
            local, here = _local_targets(labels[part], weight.size(0), ctx.group)
            d_logits = probs * -(d_logprob[part, None] + d_entropy[part, None] * (logits + entropy[part, None]))
            d_logits[torch.arange(len(local), device=local.device), local] += d_logprob[part] * here
            d_logits = (d_logits * ctx.scale).to(hidden.dtype)
            d_hidden[part] = d_logits @ weight
            if d_weight is not None:
                d_weight += d_logits.t() @ hidden[part]
        dist.all_reduce(d_hidden, group=ctx.group)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None, None


def token_scores(
    hidden: Tensor, weight: Tensor, labels: Tensor, banned: Tensor, temperature: float, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy of its distribution.

    The distribution is softmax(hidden W^T / temperature) over the ids that are not banned, which is what the
    rollout samples from.

    Args:
        hidden: [n, D], replicated over ``group``.
        weight: [V, D], this rank's vocabulary rows.
        labels: int64 [n], global ids; a banned label gets a log-probability near -1e30.
        banned: bool [V], ids of this rank that cannot be sampled.
        temperature: positive.
        group: tensor-parallel group.

    Returns:
        Float32 log-probabilities [n] and entropies [n], the same on every rank of the group.
    """
    if len(hidden) == 0:
        nothing = (hidden.sum() + 0.0 * weight.sum()).float().expand(0)
        return nothing, nothing
    return _VocabParallelScores.apply(hidden, weight, labels, banned, 1.0 / temperature, group)


def init_value_head(weight: Tensor, how: str, generator: torch.Generator) -> None:
    """Fill the value head ``weight`` [1, D] in place.

    ``orz``: N(0, 1/(D+1)), Open-Reasoner-Zero's code; ``kaiming``: kaiming_uniform with a = sqrt 5, that is
    U(-1/sqrt D, 1/sqrt D); ``paper``: U(-sqrt 5, sqrt 5), the text of section 3.2.
    """
    width = weight.size(1)
    values = torch.empty(weight.shape, dtype=torch.float32)
    if how == "orz":
        values.normal_(0.0, (1.0 / (width + 1)) ** 0.5, generator=generator)
    else:
        bound = width**-0.5 if how == "kaiming" else 5.0**0.5
        values.uniform_(-bound, bound, generator=generator)
    with torch.no_grad():
        weight.copy_(values)
