"""Floating-point operations of a training step, for MFU; recomputation does not count.

A product of a token with a matrix of N weights is 2 N FLOP forward, 2 N for the gradient of its input and 2 N for
that of the matrix (only where it is trained).  Causal attention over a document of n tokens is 2 n^2 x width forward
(half of the full square) and twice that backward.  In all, for a trained language model of N weights (layers and head,
without the embedding table) and L layers: 6 N tokens + 6 L width x sum of n^2.
"""

from __future__ import annotations

from collections.abc import Sequence

from ovr_megatron.model.shape import ModelShape


def language_weights(shape: ModelShape, critic: bool = False) -> int:
    """Count the weights of the matrices that every token is multiplied with: layers and head."""
    query_width = shape.heads * shape.head_dim
    key_width = shape.kv_heads * shape.head_dim
    attention = 2 * shape.hidden * query_width + 2 * shape.hidden * key_width
    mlp = 3 * shape.hidden * shape.ffn
    head = shape.hidden * (1 if critic else shape.vocab)
    return shape.layers * (attention + mlp) + head


def attention_forward(shape: ModelShape, squares: float) -> float:
    """Return the FLOP of the language model's causal attention over documents of summed squared lengths ``squares``."""
    return 2.0 * shape.layers * shape.heads * shape.head_dim * squares


def patch_forward(shape: ModelShape, frame: int) -> tuple[float, float]:
    """Return the FLOP of the vision tower and of the merger for a patch of a frame of ``frame`` patches.

    Attention of the tower is not causal.
    """
    vision = shape.vision
    layer_weights = 4 * vision.hidden**2 + 3 * vision.hidden * vision.ffn
    weights = vision.depth * layer_weights + vision.patch_dim * vision.hidden
    full_layers = len([layer for layer in vision.full_attention_layers if layer < vision.depth])
    window = min(frame, (vision.window // vision.patch) ** 2)
    attended = full_layers * frame + (vision.depth - full_layers) * window  # patches, over all layers
    tower = 2.0 * weights + 4.0 * vision.hidden * attended
    merged_width = vision.hidden * vision.merge**2
    merger = 2.0 * merged_width * (merged_width + shape.hidden) / vision.merge**2
    return tower, merger


def training_passes(language_trains: bool, vision_trains: bool, merger_trains: bool) -> tuple[float, float, float]:
    """Return the FLOP of forward and backward over those of forward: language model's matrices, tower, merger.

    Gradients only pass through a frozen part above one that trains; through the language model they always do.
    """
    merger = 3.0 if merger_trains else 2.0 if vision_trains else 1.0
    return 3.0 if language_trains else 2.0, 3.0 if vision_trains else 1.0, merger


def training_flops(
    shape: ModelShape,
    lengths: Sequence[int],
    grids: Sequence[Sequence[int]] = (),
    language_trains: bool = True,
    vision_trains: bool = False,
    merger_trains: bool = False,
) -> float:
    """Return the FLOP of one forward and backward pass.

    Args:
        shape: the model's sizes.
        lengths: tokens of each document.
        grids: frames, height and width in patches of each image or video.
        language_trains: whether gradients of the language model's weights are computed.
        vision_trains: whether those of the vision tower are; a tower that does not train has no backward pass.
        merger_trains: whether those of the merger are.
    """
    matrix_passes, tower_passes, merger_passes = training_passes(language_trains, vision_trains, merger_trains)
    flops = 2.0 * matrix_passes * language_weights(shape) * sum(lengths)
    flops += 3.0 * attention_forward(shape, sum(length**2 for length in lengths))
    images: float = 0
    for frames, height, width in grids:
        tower, merger = patch_forward(shape, height * width)
        images += frames * height * width * (tower_passes * tower + merger_passes * merger)
    return flops + images
