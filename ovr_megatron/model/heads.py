"""Log-probabilities and entropy over a vocabulary-parallel head, tile by tile.

Backward recomputes the logits, except where all of them together are small.

Shapes: n scored tokens, D model width, V vocabulary rows of this rank; a tile holds t of the tokens and v of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ovr_megatron.model import kernels

BANNED = -1.0e30
# Bytes of one float32 tile of logits: on a CPU it fits the cache, on a GPU it is as large as the matrix units need.
_TILE_BYTES = {"cpu": 4 << 20, "cuda": 128 << 20}
# Bytes of all logits in float32 up to which they are kept for backward instead of being recomputed.
_KEPT_BYTES = {"cpu": 16 << 20, "cuda": 128 << 20}


def float_product(left: Tensor, right: Tensor) -> Tensor:
    """Return float32 ``left @ right`` [n, m] of two matrices of one dtype.

    Logits of 20 to 30 rounded to bfloat16 lie 0.125 apart, and a log-probability has the same error; vLLM multiplies
    in the same way (`rollout/engine.py`).  A GPU multiplies bfloat16 operands at their own speed and accumulates in
    float32 anyway.
    """
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _blocks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        end = min(start + size, count)
        yield slice(start, end)


def tile_sides(tokens: int, rows: int, device: torch.device) -> tuple[int, int]:
    """Return the sides of a tile, tokens and vocabulary rows.

    They are powers of two, or at least multiples of a cache line, where the sizes allow it.
    """
    elements = _TILE_BYTES[device.type] // 4  # float32
    exponent = elements.bit_length() - 1
    square_side = 1 << exponent // 2
    tile_tokens = min(tokens, square_side)
    tile_rows = elements // tile_tokens
    whole_lines = tile_rows // 64 * 64
    if whole_lines:
        tile_rows = whole_lines
    return tile_tokens, min(rows, tile_rows)


def keeps_logits(tokens: int, rows: int, device: torch.device) -> bool:
    """Whether the logits of ``tokens`` and vocabulary ``rows`` are kept for backward."""
    logit_bytes = 4 * tokens * rows
    return logit_bytes <= _KEPT_BYTES[device.type]


def _shifted(tile: Tensor, scale: float, shift: Tensor, keep: bool = False) -> Tensor:
    """Return ``scale * tile - shift`` [t, v], written over the tile unless ``keep``.  ``shift`` is [t]."""
    target = None if keep else tile
    # One pass over the tile: multiplied and shifted without a tensor in between.
    return torch.add(-shift[:, None], tile, alpha=scale, out=target)


def _rebased(
    total: Tensor,
    weighted: Tensor,
    peak: Tensor,
    top: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return sums of e^x and of x e^x with x relative to ``top`` from those relative to ``peak``; all [t]."""
    shift = peak - top
    factor = shift.exp()
    rebased_total = total * factor
    rebased_weighted = (weighted + shift * total) * factor
    return rebased_total, rebased_weighted


def _labels_within(labels: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Return the labels as columns [t, 1] of a tile, any column for those outside of it, and a mask of those inside."""
    inside = (labels >= 0) & (labels < columns)
    # The mask takes the value of a label outside away again, but `gather` refuses columns that are not there.
    column = torch.where(inside, labels, 0)
    return column[:, None], inside


def _add_tile(
    tile: Tensor,
    banned: Tensor,
    labels: Tensor,
    peak: Tensor,
    total: Tensor,
    weighted: Tensor,
    target: Tensor,
    scale: float,
    keep: bool,
) -> None:
    """Add a tile to each token's statistics, see `kernels.add_tile`; the tile is overwritten unless ``keep``."""
    if tile.is_cuda:
        kernels.add_tile(tile, banned, labels, peak, total, weighted, target, scale)
        return
    # Over the scale, so that after scaling it is `BANNED`: finite, as an infinity less an infinity is no number.
    banned_columns = banned.nonzero()[:, 0]
    tile.index_fill_(1, banned_columns, BANNED / scale)
    column, inside = _labels_within(labels, tile.size(1))
    label_logits = tile.gather(1, column)[:, 0]
    target += torch.where(inside, label_logits * scale, 0.0)
    tile_peak = tile.amax(-1) * scale
    top = torch.maximum(peak, tile_peak)
    x = _shifted(tile, scale, top, keep)
    weights = x.exp()
    total_before, weighted_before = _rebased(total, weighted, peak, top)
    tile_total = weights.sum(-1)
    total.copy_(total_before + tile_total)
    tile_weighted = weights.mul_(x).sum(-1)
    weighted.copy_(weighted_before + tile_weighted)
    peak.copy_(top)


def _tile_gradient(
    tile: Tensor,
    banned: Tensor,
    labels: Tensor,
    norm: Tensor,
    entropy: Tensor,
    d_logprob: Tensor,
    d_entropy: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Return the gradient of a tile, see `kernels.tile_gradient`."""
    if tile.is_cuda:
        return kernels.tile_gradient(
            tile,
            banned,
            labels,
            norm,
            entropy,
            d_logprob,
            d_entropy,
            scale,
            dtype,
        )
    x = _shifted(tile, scale, norm)
    # With p = e^x:  d tile = -p (d logprob + (x + entropy) d entropy), and d logprob more at the label.
    if d_entropy is None:
        d_tile = x.exp_().mul_(-d_logprob[:, None])
    else:
        probs = x.exp()
        x.add_(entropy[:, None])
        x.mul_(-d_entropy[:, None])
        x.sub_(d_logprob[:, None])
        d_tile = x.mul_(probs)
    column, inside = _labels_within(labels, tile.size(1))
    label_grads = d_logprob * inside
    d_tile.scatter_add_(1, column, label_grads[:, None])
    banned_columns = banned.nonzero()[:, 0]
    d_tile.index_fill_(1, banned_columns, 0.0)
    return d_tile.to(dtype)


def _all_reduce(tensor: Tensor, group: dist.ProcessGroup, op: Any = dist.ReduceOp.SUM) -> None:
    if group.size() > 1:  # a collective of one rank still costs as much as a small product
        dist.all_reduce(tensor, op, group=group)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to the float32 ``total``."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += float_product(left, right)


class _VocabParallelScores(torch.autograd.Function):
    """Log-probabilities and entropies of a vocabulary-parallel head.

    The outer loop is over the vocabulary, so a block of the weight's gradient is complete before the next begins:
    nothing of the size of the weight is allocated but the gradient that is returned.
    """

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
        token_count = len(hidden)
        row_count = len(weight)
        tokens, rows = tile_sides(token_count, row_count, hidden.device)
        local = labels - group.rank() * row_count
        total, weighted, target = hidden.new_zeros(3, token_count, dtype=torch.float32)
        peak = torch.full_like(total, BANNED)
        keep = keeps_logits(token_count, row_count, hidden.device)
        tiles: list[Tensor] = []
        for columns in _blocks(row_count, rows):
            for part in _blocks(token_count, tokens):
                tile = float_product(hidden[part], weight[columns].t())
                _add_tile(
                    tile,
                    banned[columns],
                    local[part] - columns.start,
                    peak[part],
                    total[part],
                    weighted[part],
                    target[part],
                    scale,
                    keep,
                )
                if keep:
                    tiles.append(tile)
        # Two collectives: the largest logit of all ranks, then the three sums, which are relative to it.
        top = peak.clone()
        _all_reduce(top, group, dist.ReduceOp.MAX)
        local_total, local_weighted = _rebased(total, weighted, peak, top)
        # A label lies on one rank and the others have 0 for it, so that the sum is its scaled logit.
        sums = torch.stack((local_total, local_weighted, target))
        _all_reduce(sums, group)
        total, weighted, target = sums
        norm = top + total.log()
        logprob = target - norm
        entropy = total.log() - weighted / total
        ctx.save_for_backward(hidden, weight, local, banned, norm, entropy, *tiles)
        ctx.set_materialize_grads(False)  # without a gradient of the entropy its term is left out
        ctx.scale = scale
        ctx.group = group
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, local, banned, norm, entropy, *tiles = ctx.saved_tensors
        d_logprob, d_entropy = (None if grad is None else grad * ctx.scale for grad in grads)
        if d_logprob is None:
            d_logprob = torch.zeros_like(norm)
        tokens, rows = tile_sides(len(hidden), len(weight), hidden.device)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        # In float32, since it is summed over the blocks of the vocabulary; a weight's block is complete at once.
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
        d_weight = torch.empty_like(weight) if needs_weight else None
        for columns in _blocks(len(weight), rows):
            d_block = None
            if needs_weight:
                d_block = torch.zeros_like(weight[columns], dtype=torch.float32)
            for part in _blocks(len(hidden), tokens):
                # A stored tile is overwritten with its gradient: backward reads it once.
                if tiles:
                    tile = tiles.pop(0)
                else:
                    tile = float_product(hidden[part], weight[columns].t())
                part_d_entropy = None if d_entropy is None else d_entropy[part]
                d_tile = _tile_gradient(
                    tile,
                    banned[columns],
                    local[part] - columns.start,
                    norm[part],
                    entropy[part],
                    d_logprob[part],
                    part_d_entropy,
                    ctx.scale,
                    hidden.dtype,
                )
                if d_hidden is not None:
                    _add_product(d_hidden[part], d_tile, weight[columns])
                if d_block is not None:
                    _add_product(d_block, d_tile.t(), hidden[part])
            if d_weight is not None:
                d_weight[columns] = d_block
        if d_hidden is not None:
            # Each rank has the gradient through its own vocabulary rows.
            d_hidden = d_hidden.to(hidden.dtype)
            _all_reduce(d_hidden, ctx.group)
        return d_hidden, d_weight, None, None, None, None


def token_scores(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    banned: Tensor,
    temperature: float,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each label and the entropy of its distribution.

    The distribution is softmax(hidden W^T / temperature) over the ids that are not banned, the one that the rollout
    samples from.  Logits are float32 (`float_product`); their gradients are rounded to the dtype of ``hidden``
    for the products that follow.

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
    if len(hidden) == 0:  # hidden states and weight stay in the graph, so that backward runs on this rank, too
        zero = hidden.sum() + 0.0 * weight.sum()
        empty = zero.float().expand(0)
        return empty, empty
    scale = 1.0 / temperature
    return _VocabParallelScores.apply(hidden, weight, labels, banned, scale, group)


class ValueHead(torch.nn.Linear):
    """A linear map without bias from hidden states [n, D] to float32 values [n].

    It computes in float32 whatever its weight's dtype: bfloat16 would round a value of 0.5 to steps of 0.004, as large
    as what one optimizer step changes.
    """

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device | int):
        super().__init__(width, 1, bias=False, dtype=dtype, device=device)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the values [n] of ``hidden`` [n, D]."""
        values = F.linear(hidden.float(), self.weight.float())
        return values[:, 0]


def init_value_head(weight: Tensor, how: str, generator: torch.Generator) -> None:
    """Fill the value head ``weight`` [1, D] in place.

    ``orz``: normal with mean 0 and standard deviation 1/(D+1), Open-Reasoner-Zero's ``orz/ppo/models.py``; ``kaiming``:
    kaiming_uniform with a = sqrt 5, that is U(-1/sqrt D, 1/sqrt D); ``paper``: U(-sqrt 5, sqrt 5), the text of section
    3.2.  After the final norm a hidden state is about sqrt D long, so values begin with a standard deviation of about
    1/sqrt D, 1/sqrt 3 or sqrt(5 D/3): only the first lies well below a reward of 1.
    """
    width = weight.size(1)
    values = torch.empty(weight.shape, dtype=torch.float32)
    if how == "orz":
        values.normal_(0.0, 1.0 / (width + 1), generator=generator)
    else:
        bound = width**-0.5 if how == "kaiming" else 5.0**0.5
        values.uniform_(-bound, bound, generator=generator)
    with torch.no_grad():
        weight.copy_(values)
