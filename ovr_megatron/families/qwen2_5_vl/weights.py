"""Qwen2.5-VL's weights: the Hugging Face tensors of each Megatron parameter (`ovr_megatron.weights.table`)."""

from __future__ import annotations

from ovr_megatron.families import ModelShape, WeightEntry

# Megatron parameter, Hugging Face tensors, kind, size of each Hugging Face tensor.
# Language model: D width, F feed-forward, Q queries (heads x head size), K keys or values, V vocabulary.
# Vision tower: E width, G feed-forward, M merged width (E x merge^2), C channels, T frames and P pixels of a patch.
TABLE: tuple[WeightEntry, ...] = (
    ("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocabulary", ("V D",)),
    (
        "decoder.layers.{i}.self_attention.linear_qkv.layer_norm_weight",
        ("model.layers.{i}.input_layernorm.weight",),
        "replicated",
        ("D",),
    ),
    (
        "decoder.layers.{i}.self_attention.linear_qkv.weight",
        (
            "model.layers.{i}.self_attn.q_proj.weight",
            "model.layers.{i}.self_attn.k_proj.weight",
            "model.layers.{i}.self_attn.v_proj.weight",
        ),
        "qkv",
        ("Q D", "K D", "K D"),
    ),
    (
        "decoder.layers.{i}.self_attention.linear_qkv.bias",
        (
            "model.layers.{i}.self_attn.q_proj.bias",
            "model.layers.{i}.self_attn.k_proj.bias",
            "model.layers.{i}.self_attn.v_proj.bias",
        ),
        "qkv",
        ("Q", "K", "K"),
    ),
    (
        "decoder.layers.{i}.self_attention.linear_proj.weight",
        ("model.layers.{i}.self_attn.o_proj.weight",),
        "row",
        ("D Q",),
    ),
    (
        "decoder.layers.{i}.mlp.linear_fc1.layer_norm_weight",
        ("model.layers.{i}.post_attention_layernorm.weight",),
        "replicated",
        ("D",),
    ),
    (
        "decoder.layers.{i}.mlp.linear_fc1.weight",
        ("model.layers.{i}.mlp.gate_proj.weight", "model.layers.{i}.mlp.up_proj.weight"),
        "gate_up",
        ("F D", "F D"),
    ),
    ("decoder.layers.{i}.mlp.linear_fc2.weight", ("model.layers.{i}.mlp.down_proj.weight",), "row", ("D F",)),
    ("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated", ("D",)),
    ("output_layer.weight", ("lm_head.weight",), "vocabulary", ("V D",)),
    ("value_head.weight", ("value_head.weight",), "replicated", ("1 D",)),
    ("vision.patch_embed.weight", ("visual.patch_embed.proj.weight",), "patch", ("E C T P P",)),
    (
        "vision.layers.{i}.self_attention.linear_qkv.layer_norm_weight",
        ("visual.blocks.{i}.norm1.weight",),
        "replicated",
        ("E",),
    ),
    (
        "vision.layers.{i}.self_attention.linear_qkv.weight",
        ("visual.blocks.{i}.attn.qkv.weight",),
        "vision_qkv",
        ("3E E",),
    ),
    ("vision.layers.{i}.self_attention.linear_qkv.bias", ("visual.blocks.{i}.attn.qkv.bias",), "vision_qkv", ("3E",)),
    ("vision.layers.{i}.self_attention.linear_proj.weight", ("visual.blocks.{i}.attn.proj.weight",), "row", ("E E",)),
    ("vision.layers.{i}.self_attention.linear_proj.bias", ("visual.blocks.{i}.attn.proj.bias",), "replicated", ("E",)),
    ("vision.layers.{i}.mlp.linear_fc1.layer_norm_weight", ("visual.blocks.{i}.norm2.weight",), "replicated", ("E",)),
    (
        "vision.layers.{i}.mlp.linear_fc1.weight",
        ("visual.blocks.{i}.mlp.gate_proj.weight", "visual.blocks.{i}.mlp.up_proj.weight"),
        "gate_up",
        ("G E", "G E"),
    ),
    (
        "vision.layers.{i}.mlp.linear_fc1.bias",
        ("visual.blocks.{i}.mlp.gate_proj.bias", "visual.blocks.{i}.mlp.up_proj.bias"),
        "gate_up",
        ("G", "G"),
    ),
    ("vision.layers.{i}.mlp.linear_fc2.weight", ("visual.blocks.{i}.mlp.down_proj.weight",), "row", ("E G",)),
    ("vision.layers.{i}.mlp.linear_fc2.bias", ("visual.blocks.{i}.mlp.down_proj.bias",), "replicated", ("E",)),
    ("vision.merger.norm.weight", ("visual.merger.ln_q.weight",), "replicated", ("E",)),
    ("vision.merger.linear_fc1.weight", ("visual.merger.mlp.0.weight",), "column", ("M M",)),
    ("vision.merger.linear_fc1.bias", ("visual.merger.mlp.0.bias",), "column", ("M",)),
    ("vision.merger.linear_fc2.weight", ("visual.merger.mlp.2.weight",), "row", ("D M",)),
    ("vision.merger.linear_fc2.bias", ("visual.merger.mlp.2.bias",), "replicated", ("D",)),
)


def sizes(shape: ModelShape) -> dict[str, int]:
    """Return the numbers that the letters of `TABLE` stand for."""
    vision = shape.vision
    return {
        "1": 1,
        "D": shape.hidden,
        "F": shape.ffn,
        "Q": shape.heads * shape.head_dim,
        "K": shape.kv_heads * shape.head_dim,
        "V": shape.vocab,
        "E": vision.hidden,
        "3E": 3 * vision.hidden,
        "G": vision.ffn,
        "M": vision.hidden * vision.merge**2,
        "C": vision.in_channels,
        "T": vision.temporal_patch,
        "P": vision.patch,
    }
