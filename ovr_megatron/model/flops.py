"""Floating-point operations of a training step, for MFU; recomputation does not count.

A product of a token with a matrix of N weights is 2 N FLOP forward, 2 N for the gradient of its input and 2 N for
that of the matrix (only where it is trained).  Causal attention over a document of n tokens is 2 n^2 x width forward
(half of the full square) and twice that backward.  In all, for a trained language model of N weights (layers and head,
without the embedding table) and L layers: 6 N tokens + 6 L width x sum of n^2.
"""

from __future__ import annotations

from collections.abc import Sequence

from ovr_megatron.model.shape import ModelShape, VisionShape


def language_weights(shape: ModelShape) -> int:
    """Weights of the matrices that every token meets: layers and head."""
    width = shape.heads * shape.head_dim
    attention = 2 * shape.hidden * width + 2 * shape.hidden * shape.kv_heads * shape.head_dim
    return shape.layers * (attention + 3 * shape.hidden * shape.ffn) + shape.vocab * shape.hidden


def training_flops(
    shape: ModelShape,
    lengths: Sequence[int],
    grids: Sequence[Sequence[int]] = (),
    language_trains: bool = True,
    vision_trains: bool = False,
) -> float:
    """FLOP of one forward and backward pass.

    Args:
        shape: the model's sizes.
        lengths: tokens of each document.
        grids: frames, height and width in patches of each image or video.
        language_trains: whether gradients of the language model's weights are computed.
        vision_trains: whether those of the vision tower are; a tower that does not train has no backward pass.
    """
    passes = 6.0 if language_trains else 4.0
    squares = sum(length**2 for length in lengths)
    flops = passes * language_weights(shape) * sum(lengths)
    flops += 6.0 * shape.layers * shape.heads * shape.head_dim * squares
    return flops + (3.0 if vision_trains else 1.0) * sum(_vision_forward(shape.vision, shape.hidden, g) for g in grids)


def _vision_forward(vision: VisionShape, out: int, grid: Sequence[int]) -> float:
    """FLOP of the forward pass of the tower and its merger over one image or video; attention is not causal."""
    frames, frame = grid[0], grid[1] * grid[2]
    merged = vision.hidden * vision.merge**2
    weights = vision.depth * (4 * vision.hidden**2 + 3 * vision.hidden * vision.ffn)
    weights += vision.patch_dim * vision.hidden
    merger = (merged**2 + merged * out) / vision.merge**2
    full = len(vision.full_attention_layers)
    window = min(frame, (vision.window // vision.patch) ** 2)
    seen = full * frame + (vision.depth - full) * window  # patches that a patch attends to, over all layers
    return frames * frame * (2.0 * (weights + merger) + 4.0 * vision.hidden * seen)
