"""What a token and a patch cost in Qwen3-VL: weights that they are multiplied with, and attention."""

from __future__ import annotations

from ovr_megatron.families import ModelShape


def language_weights(shape: ModelShape, critic: bool = False) -> int:
    """Count the weights of the matrices that every token is multiplied with: layers and head."""
    query_width = shape.heads * shape.head_dim
    key_width = shape.kv_heads * shape.head_dim
    # Queries and output have one width, keys and values another.
    attention = 2 * shape.hidden * (query_width + key_width)
    # Gate, up and down.
    mlp = 3 * shape.hidden * shape.ffn
    head_rows = 1 if critic else shape.vocab
    return shape.layers * (attention + mlp) + shape.hidden * head_rows


def patch_forward(shape: ModelShape, frame: int) -> tuple[float, float]:
    """Return the FLOP of the vision tower and of the mergers for a patch of a frame of ``frame`` patches.

    Attention of the tower is not causal.  The four products of a patch with its learned positions are not counted.
    """
    vision = shape.vision
    # Queries, keys, values and output; up and down.
    attention = 4 * vision.hidden**2
    mlp = 2 * vision.hidden * vision.ffn
    embedding = vision.patch_dim * vision.hidden
    weights = vision.depth * (attention + mlp) + embedding
    # A multiplication and an addition for each weight; attention has them for scores and for values.
    tower = 2.0 * weights + 4.0 * vision.hidden * vision.depth * frame
    merged_patches = vision.merge**2
    merged_width = vision.hidden * merged_patches
    # The two layers are computed once for the patches of a feature, in the merger and in those of DeepStack.
    merger = 2.0 * merged_width * (merged_width + shape.hidden) / merged_patches
    return tower, (1 + vision.layer_features) * merger
