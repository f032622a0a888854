"""FLOP of Qwen2.5-VL's vision tower and merger."""

from __future__ import annotations

from ovr_megatron.families import ModelShape
from ovr_megatron.families.qwen2_5_vl.shape import vision_shape


def patch_forward(shape: ModelShape, frame: int) -> tuple[float, float]:
    """Return the FLOP of the vision tower and of the merger for a patch of a frame of ``frame`` patches.

    Attention of the tower is not causal.
    """
    vision = vision_shape(shape)
    # Queries, keys, values and output; gate, up and down.
    attention = 4 * vision.hidden**2
    mlp = 3 * vision.hidden * vision.ffn
    embedding = vision.patch_dim * vision.hidden
    weights = vision.depth * (attention + mlp) + embedding
    # The defaults of Transformers name layers that a small tower does not have.
    full_layers = 0
    for layer in vision.full_attention_layers:
        if layer < vision.depth:
            full_layers += 1
    window_layers = vision.depth - full_layers
    side = vision.window // vision.patch
    window = min(frame, side**2)
    attended = full_layers * frame + window_layers * window  # patches, over all layers
    # A multiplication and an addition for each weight; attention has them for scores and for values.
    tower = 2.0 * weights + 4.0 * vision.hidden * attended
    merged_patches = vision.merge**2
    merged_width = vision.hidden * merged_patches
    # The two layers are computed once for the patches of a feature.
    merger = 2.0 * merged_width * (merged_width + shape.hidden) / merged_patches
    return tower, merger
