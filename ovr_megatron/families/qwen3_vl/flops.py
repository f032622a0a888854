"""FLOP of Qwen3-VL's vision tower and mergers."""

from __future__ import annotations

from ovr_megatron.families import ModelShape


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
