"""Floating-point operations of a training step, for MFU; recomputation does not count.

A product of a token with a matrix of N weights is 2 N FLOP forward, 2 N for the gradient of its input and 2 N for
that of the matrix (only where it is trained).  Causal attention over a document of n tokens is 2 n^2 x width forward
(half of the full square) and twice that backward.  In all, for a trained language model of N weights (layers and head,
without the embedding table) and L layers: 6 N tokens + 6 L width x sum of n^2.
"""

from __future__ import annotations

from collections.abc import Sequence

from ovr_megatron.families import ModelShape, family_of


def language_weights(shape: ModelShape, critic: bool = False) -> int:
    """Count the weights of the matrices that every token is multiplied with: layers and head."""
    query_width = shape.heads * shape.head_dim
    key_width = shape.kv_heads * shape.head_dim
    # Queries and output have one width, keys and values another.
    query_and_output = 2 * shape.hidden * query_width
    key_and_value = 2 * shape.hidden * key_width
    # Gate, up and down.
    mlp = 3 * shape.hidden * shape.ffn
    layer = query_and_output + key_and_value + mlp
    head_rows = 1 if critic else shape.vocab
    head = shape.hidden * head_rows
    return shape.layers * layer + head


def attention_forward(shape: ModelShape, squares: float) -> float:
    """Return the FLOP of the language model's causal attention over documents of summed squared lengths ``squares``."""
    return 2.0 * shape.layers * shape.heads * shape.head_dim * squares


def training_passes(
    language_trains: bool,
    vision_trains: bool,
    merger_trains: bool,
    vision_adapters: bool = False,
) -> tuple[float, float, float]:
    """Return the FLOP of forward and backward over those of forward: language model's matrices, tower, merger.

    Gradients only pass through a frozen part above one that trains, or beside adapters; through the language model they
    always do. The adapters' own products are not counted.
    """
    language = 3.0 if language_trains else 2.0
    tower = 1.0
    if vision_trains:
        tower = 3.0
    elif vision_adapters:
        tower = 2.0
    merger = 1.0
    if merger_trains:
        merger = 3.0
    elif vision_trains or vision_adapters:
        merger = 2.0
    return language, tower, merger


def training_flops(
    shape: ModelShape,
    lengths: Sequence[int],
    grids: Sequence[Sequence[int]] = (),
    language_trains: bool = True,
    vision_trains: bool = False,
    merger_trains: bool = False,
    vision_adapters: bool = False,
    prefixes: Sequence[int] | None = None,
) -> float:
    """Return the FLOP of one forward and backward pass.

    Args:
        shape: the model's sizes.
        lengths: tokens of each document.
        grids: frames, height and width in patches of each image or video.
        language_trains: whether gradients of the language model's weights are computed.
        vision_trains: whether those of the vision tower are; a tower that does not train has no backward pass.
        merger_trains: whether those of the merger are.
        vision_adapters: whether the tower has adapters, so that gradients pass through it.
        prefixes: for each document the tokens of another that it attends to before its own; None: no tokens.
    """
    family = family_of(shape)
    matrix_passes, tower_passes, merger_passes = training_passes(
        language_trains, vision_trains, merger_trains, vision_adapters
    )
    weights = language_weights(shape)
    flops = 2.0 * matrix_passes * weights * sum(lengths)
    # Attention has no weights: its backward pass is twice the forward one, whatever trains.
    squares = 0
    for length, prefix in zip(lengths, prefixes or [0] * len(lengths), strict=True):
        squares += (prefix + length) ** 2 - prefix**2
    flops += 3.0 * attention_forward(shape, squares)
    images: float = 0
    for frames, height, width in grids:
        # The tower attends within a frame.
        tower, merger = family.patch_forward(shape, height * width)
        patch_flops = tower_passes * tower + merger_passes * merger
        images += frames * height * width * patch_flops
    return flops + images
