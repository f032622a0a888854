"""What a token and a patch cost in Qwen2.5-VL: weights that they are multiplied with, and attention."""

from __future__ import annotations

from ovr_megatron.families import ModelShape
from ovr_megatron.families.qwen2_5_vl.shape import vision_shape


def language_weights(shape: ModelShape, critic: bool = False) -> int:
    """Count the weights of the matrices that every token is multiplied with: layers and head."""
    query_width = shape.heads * shape.head_dim
    key_width = shape.kv_heads * shape.head_dim
    # Queries and output have one width, keys and values another.
    attention = 2 * shape.hidden * query_width + 2 * shape.hidden * key_width
    # Gate, up and down.
    mlp = 3 * shape.hidden * shape.ffn
    head = shape.hidden * (1 if critic else shape.vocab)
    return shape.layers * (attention + mlp) + head


def patch_forward(shape: ModelShape, frame: int) -> tuple[float, float]:
    """Return the FLOP of the vision tower and of the merger for a patch of a frame of ``frame`` patches.

    Attention of the tower is not causal.
    """
    vision = vision_shape(shape)
    # Queries, keys, values and output; gate, up and down.
    layer_weights = 4 * vision.hidden**2 + 3 * vision.hidden * vision.ffn
    weights = vision.depth * layer_weights + vision.patch_dim * vision.hidden
    full_layers = len([layer for layer in vision.full_attention_layers if layer < vision.depth])
    window = min(frame, (vision.window // vision.patch) ** 2)
    attended = full_layers * frame + (vision.depth - full_layers) * window  # patches, over all layers
    # A multiplication and an addition for each weight; attention has them for scores and for values.
    tower = 2.0 * weights + 4.0 * vision.hidden * attended
    merged_width = vision.hidden * vision.merge**2
    merger = 2.0 * merged_width * (merged_width + shape.hidden) / vision.merge**2
    return tower, merger
