"""Triton kernels for the operations between matrix products on a GPU: each passes once over its memory.

The callers have the same arithmetic in torch, for the CPU.  Shapes: T rows, N heads of size H, F MLP columns, a tile
[t, v] of logits over t tokens and v rows of the vocabulary.  Everything is computed in float32 and rounded once,
whatever the dtype of the tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
BANNED: tl.constexpr = tl.constexpr(-1.0e30)


@triton.jit
def _swiglu(  # type: ignore[no-untyped-def]
    gate_up, out, ffn, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)  # in all kernels: a tensor may have more elements than int32 counts
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < ffn
    gates = gate_up + row * 2 * ffn + column
    ups = gate_up + row * 2 * ffn + ffn + column
    targets = out + row * ffn + column
    gate = tl.load(gates, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(ups, mask=inside, other=0.0).to(tl.float32)
    denominator = 1.0 + tl.exp(-gate)
    product = gate / denominator * up
    rounded = product.to(out.dtype.element_ty)
    tl.store(targets, rounded, mask=inside)


@triton.jit
def _swiglu_backward(  # type: ignore[no-untyped-def]
    gate_up, grad, ffn, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < ffn
    # Each program writes only the places that it alone has read: the gradient can stand in the place of its input.
    gates = gate_up + row * 2 * ffn + column
    ups = gate_up + row * 2 * ffn + ffn + column
    grads = grad + row * ffn + column
    gate = tl.load(gates, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(ups, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(grads, mask=inside, other=0.0).to(tl.float32)
    denominator = 1.0 + tl.exp(-gate)
    sigmoid = 1.0 / denominator
    weighted = upstream * up * sigmoid
    # The derivative of silu is sigmoid times this factor.
    factor = 1.0 + gate * (1.0 - sigmoid)
    d_gate = weighted * factor
    d_up = upstream * gate * sigmoid
    rounded_gate = d_gate.to(gate_up.dtype.element_ty)
    tl.store(gates, rounded_gate, mask=inside)
    rounded_up = d_up.to(gate_up.dtype.element_ty)
    tl.store(ups, rounded_up, mask=inside)


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    x,
    table,
    out,
    heads,
    half,
    row_stride,
    head_stride,
    SIGN: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    in_row = column < half
    inside = (head < heads) & in_row
    # A row of the table is twice half a head's cosines, then twice its sines.
    cosines = table + row * 4 * half + column
    sines = table + row * 4 * half + 2 * half + column
    cos = tl.load(cosines, mask=in_row, other=0.0)
    sin = tl.load(sines, mask=in_row, other=0.0) * SIGN
    source = x + row * row_stride + head * head_stride + column
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    target_head = row * heads + head
    target = out + target_head * 2 * half + column
    turned_first = first * cos - second * sin
    tl.store(target, turned_first.to(out.dtype.element_ty), mask=inside)
    turned_second = second * cos + first * sin
    tl.store(target + half, turned_second.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_tile(  # type: ignore[no-untyped-def]
    tile,
    banned,
    labels,
    peak,
    total,
    weighted,
    target,
    columns,
    scale,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits = tile + row * columns
    # Each lane has a maximum, a sum of e^x and one of x e^x of its own, x relative to that maximum.
    top = tl.full([BLOCK], BANNED, tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        # Columns past the end of the row count as banned.
        forbidden = tl.load(banned + column, mask=inside, other=1)
        logit = tl.load(logits + column, mask=inside, other=0.0)
        x = logit.to(tl.float32) * scale
        x = tl.where(forbidden != 0, BANNED, x)
        higher = tl.maximum(top, x)
        # Exponents are never positive: nothing overflows, whatever the logits.
        factor = tl.exp(top - higher)
        weight = tl.exp(x - higher)
        lane_products = products + (top - higher) * sums
        products = lane_products * factor + weight * (x - higher)
        sums = sums * factor + weight
        top = higher
    # The lanes are brought to the maximum of the row, the tiles before this one included, and added up.
    old_top = tl.load(peak + row)
    old_sum = tl.load(total + row)
    old_products = tl.load(weighted + row)
    new_top = tl.maximum(tl.max(top, 0), old_top)
    factor = tl.exp(top - new_top)
    old_factor = tl.exp(old_top - new_top)
    products = (products + (top - new_top) * sums) * factor
    tl.store(peak + row, new_top)
    sums = sums * factor
    new_sum = tl.sum(sums, 0) + old_sum * old_factor
    tl.store(total + row, new_sum)
    row_products = tl.sum(products, 0)
    rebased_products = old_products + (old_top - new_top) * old_sum
    new_products = row_products + rebased_products * old_factor
    tl.store(weighted + row, new_products)
    label = tl.load(labels + row)
    in_tile = (label >= 0) & (label < columns)
    if in_tile:
        label_logit = tl.load(logits + label)
        label_x = label_logit.to(tl.float32) * scale
        label_forbidden = tl.load(banned + label)
        tl.store(target + row, tl.where(label_forbidden != 0, BANNED, label_x))


@triton.jit
def _tile_gradient(  # type: ignore[no-untyped-def]
    tile,
    banned,
    labels,
    norm,
    entropy,
    d_logprob,
    d_entropy,
    out,
    columns,
    scale,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    logits = tile + row * columns + column
    targets = out + row * columns + column
    logit = tl.load(logits, mask=inside, other=0.0)
    x = logit.to(tl.float32) * scale
    logprob = x - tl.load(norm + row)
    forbidden = tl.load(banned + column, mask=inside, other=1)
    upstream = tl.load(d_logprob + row)
    change = tl.zeros([BLOCK], tl.float32) - upstream
    if HAS_ENTROPY:
        centred = logprob + tl.load(entropy + row)
        change -= centred * tl.load(d_entropy + row)
    change = change * tl.exp(logprob)
    label = tl.load(labels + row)
    change = change + tl.where(column == label, upstream, 0.0)
    gradient = tl.where(forbidden != 0, 0.0, change)
    rounded = gradient.to(out.dtype.element_ty)
    tl.store(targets, rounded, mask=inside)


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up [..., F] of ``gate_up`` [..., 2F], contiguous."""
    assert gate_up.is_contiguous()
    ffn = gate_up.size(-1) // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], ffn)
    _swiglu[_grid(out)](gate_up, out, ffn, BLOCK=_BLOCK)
    return out


def swiglu_backward(gate_up: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of ``gate_up`` [..., 2F], written over it, from that of the output, ``grad`` [..., F]."""
    grad = grad.contiguous()
    _swiglu_backward[_grid(grad)](gate_up, grad, grad.size(-1), BLOCK=_BLOCK)
    return gate_up


def rotate(x: Tensor, table: Tensor, sign: float) -> Tensor:
    """Rotate the pairs (x_i, x_{i + H/2}) of ``x`` [T, 1, N, H] by the angles of ``table`` [T, 1, 1, 2H]."""
    rows, _, heads, size = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    assert table.is_contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    half = size // 2
    _rotate[(rows,)](
        x,
        table,
        out,
        heads,
        half,
        x.stride(0),
        x.stride(2),
        SIGN=int(sign),
        # A block's sides are powers of two in Triton; the mask leaves out what is beyond the tensor.
        HEADS=triton.next_power_of_2(heads),
        HALF=triton.next_power_of_2(half),
    )
    return out


def add_tile(
    tile: Tensor,
    banned: Tensor,
    labels: Tensor,
    peak: Tensor,
    total: Tensor,
    weighted: Tensor,
    target: Tensor,
    scale: float,
) -> None:
    """Add a tile of logits to each token's statistics, all float32 [t], in place.

    Args:
        tile: [t, v], contiguous.
        banned: bool [v].
        labels: int64 [t], columns of the tile; a label of another tile lies outside.
        peak: the largest x = ``scale`` * logit so far.
        total: sum of e^(x - peak).
        weighted: sum of (x - peak) e^(x - peak).
        target: x of the label, once its tile has been added.
        scale: inverse temperature.
    """
    _add_tile[(len(tile),)](
        tile,
        banned.view(torch.uint8),
        labels,
        peak,
        total,
        weighted,
        target,
        tile.size(1),
        scale,
        BLOCK=2 * _BLOCK,
        num_warps=8,
    )


def tile_gradient(
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
    """Return the gradient of a tile of scaled logits [t, v], written over the logits where it has their dtype.

    Args:
        tile: [t, v], contiguous.
        banned: bool [v].
        labels: as for `add_tile`.
        norm: logarithm of the sum of e^x over the whole vocabulary [t].
        entropy: of the whole distribution [t].
        d_logprob: gradient of each label's log-probability [t].
        d_entropy: gradient of each entropy [t]; None: none flows through it.
        scale: inverse temperature.
        dtype: of the gradient.
    """
    rows, columns = tile.shape
    out = tile if dtype == tile.dtype else torch.empty_like(tile, dtype=dtype)
    # Without HAS_ENTROPY the kernel does not read this argument, which must be a tensor all the same.
    entropy_grad = d_logprob if d_entropy is None else d_entropy
    _tile_gradient[(rows, triton.cdiv(columns, _BLOCK))](
        tile,
        banned.view(torch.uint8),
        labels,
        norm,
        entropy,
        d_logprob,
        entropy_grad,
        out,
        columns,
        scale,
        HAS_ENTROPY=d_entropy is not None,
        BLOCK=_BLOCK,
    )
    return out


def _grid(rows: Tensor) -> tuple[int, int]:
    """Return a grid of one program for each block of each row of ``rows`` [..., F]."""
    width = rows.size(-1)
    row_count = rows.numel() // width
    return row_count, triton.cdiv(width, _BLOCK)
