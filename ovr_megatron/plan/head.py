"""Bytes of the last pipeline stage's norm and head (`ovr_megatron.model.heads`): its tiles, logits and gradients.

The language-model head stores its logits where they are few, and recomputes them tile by tile where they are many.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ovr_megatron.config import ParallelConfig
from ovr_megatron.families import ModelShape
from ovr_megatron.model.heads import keeps_logits, tile_sides
from ovr_megatron.plan.layer import FLOAT_BYTES, LayerSizes
from ovr_megatron.weights.table import padded_vocab

_INDEX_BYTES = 8


@dataclass(frozen=True)
class HeadBytes:
    """Bytes of the last stage's norm and head: stored, and the peaks beyond what the layers store."""

    stored: int
    forward: int
    backward: int


@dataclass(frozen=True)
class _TileBytes:
    """Bytes of a vocabulary-parallel head: stored scores, transient tiles of forward, and of backward."""

    scores: int
    forward: int
    backward: int


def head_bytes(
    shape: ModelShape,
    parallel: ParallelConfig,
    scored_tokens: int,
    layer: LayerSizes,
    critic: bool,
) -> HeadBytes:
    """Return the bytes of the head after ``layer``, for a pack with ``scored_tokens`` on all context-parallel ranks."""
    hidden = shape.hidden
    dtype_bytes = layer.dtype_bytes
    rank_scored = -(-scored_tokens // parallel.cp)
    scored = min(rank_scored, layer.rows)
    scored_elements = scored * hidden
    scored_bytes = scored_elements * dtype_bytes
    widened_bytes = scored_elements * FLOAT_BYTES
    is_narrow = dtype_bytes < FLOAT_BYTES
    gathered = layer.input
    if parallel.sequence_parallel:
        gathered = layer.rows * hidden * dtype_bytes
    # The final norm's input and scale, and the scored rows of its output, which the value head widens to float32.
    stored = layer.input + layer.sp_rows * FLOAT_BYTES
    stored += widened_bytes if critic else scored_bytes
    stored += layer.norm_copies
    if critic:
        narrow_rows = scored_bytes if is_narrow else 0
        return HeadBytes(
            stored=stored,
            forward=stored + gathered + narrow_rows,
            backward=stored + scored_bytes + gathered,
        )
    vocab = padded_vocab(shape, parallel.tp) // parallel.tp
    tiles = _tile_bytes(shape, scored, vocab, layer)
    stored += tiles.scores
    forward = stored + tiles.forward
    if parallel.sequence_parallel:
        forward += gathered
    # The gradient of the head's input is summed in float32 over the tiles, and rounded at the end.
    hidden_gradient = widened_bytes
    if is_narrow:
        hidden_gradient += scored_bytes
    tile_peak = hidden_gradient + tiles.backward
    rows_gradient = scored_bytes + gathered
    weight = vocab * hidden * dtype_bytes
    backward = stored + weight + max(tile_peak, rows_gradient)
    return HeadBytes(stored=stored, forward=forward, backward=backward)


def _tile_bytes(shape: ModelShape, scored: int, vocab: int, layer: LayerSizes) -> _TileBytes:
    hidden = shape.hidden
    dtype_bytes = layer.dtype_bytes
    device = torch.device(layer.kernels.device)
    is_narrow = dtype_bytes < FLOAT_BYTES
    tile_tokens, tile_rows = tile_sides(max(scored, 1), vocab, device)
    tile = tile_tokens * tile_rows
    tile_bytes = tile * FLOAT_BYTES
    row_bytes = 3 * FLOAT_BYTES + 2 * _INDEX_BYTES
    scores = scored * row_bytes
    stores_logits = keeps_logits(scored, vocab, device)
    if stores_logits:
        scores += scored * vocab * FLOAT_BYTES
    # Logits, and their gradient written over them.
    forward = tile_bytes
    backward = tile_bytes
    # The gradient of one block of the weight's rows.
    product = tile_rows * hidden * FLOAT_BYTES
    if is_narrow:  # the gradient is rounded into a tile of its own, and its product added to a float32 sum
        backward = tile * dtype_bytes + product
        if not stores_logits:
            backward += tile_bytes
    if layer.kernels.device == "cpu":
        forward += tile_bytes
        if is_narrow:  # a CPU widens both sides of a product to float32
            sides = tile_tokens + tile_rows
            widened = sides * hidden * FLOAT_BYTES
            forward = max(forward, tile_bytes + widened)
            backward += tile_bytes + widened
            backward -= product  # a side as large as the product is counted in it
    return _TileBytes(scores, forward, backward + product)
