"""Qwen3-VL's weights: the Hugging Face tensors of each Megatron parameter (`ovr_megatron.weights.table`)."""

from __future__ import annotations

from collections.abc import Mapping

from ovr_megatron.families import ModelShape, WeightEntry
from ovr_megatron.families.qwen3_vl.shape import vision_shape

# Megatron parameter, Hugging Face tensors, kind, size of each Hugging Face tensor.
# Language model: D width, F feed-forward, Q queries (heads x head size), K keys or values, H head size, V vocabulary.
# Vision tower: E width, G feed-forward, M merged width (E x merge^2), N learned positions, C channels, T frames and
# P pixels of a patch.
_LAYER = "decoder.layers.{i}"
_HF_LAYER = "model.layers.{i}"
_BLOCK = "vision.layers.{i}"
_HF_BLOCK = "visual.blocks.{i}"


def _linear(megatron: str, hf: str, kind: str, rows: str, columns: str) -> tuple[WeightEntry, WeightEntry]:
    """Return the rows of the weight and of the bias of a linear layer of ``rows`` x ``columns``."""
    # A row-parallel bias is added to the sum over the ranks: all of them hold it.
    bias_kind = "replicated" if kind == "row" else kind
    return (
        (f"{megatron}.weight", (f"{hf}.weight",), kind, (f"{rows} {columns}",)),
        (f"{megatron}.bias", (f"{hf}.bias",), bias_kind, (rows,)),
    )


def _norm(megatron: str, hf: str, width: str, separator: str = ".") -> tuple[WeightEntry, WeightEntry]:
    """Return the rows of the weight and of the bias of a LayerNorm."""
    return (
        (f"{megatron}{separator}weight", (f"{hf}.weight",), "replicated", (width,)),
        (f"{megatron}{separator}bias", (f"{hf}.bias",), "replicated", (width,)),
    )


def _merger(megatron: str, hf: str, norm_width: str) -> tuple[WeightEntry, ...]:
    """Return the rows of a merger."""
    return (
        *_norm(f"{megatron}.norm", f"{hf}.norm", norm_width),
        *_linear(f"{megatron}.linear_fc1", f"{hf}.linear_fc1", "column", "M", "M"),
        *_linear(f"{megatron}.linear_fc2", f"{hf}.linear_fc2", "row", "D", "M"),
    )


TABLE: tuple[WeightEntry, ...] = (
    ("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocabulary", ("V D",)),
    (
        f"{_LAYER}.self_attention.linear_qkv.layer_norm_weight",
        (f"{_HF_LAYER}.input_layernorm.weight",),
        "replicated",
        ("D",),
    ),
    (
        f"{_LAYER}.self_attention.linear_qkv.weight",
        (
            f"{_HF_LAYER}.self_attn.q_proj.weight",
            f"{_HF_LAYER}.self_attn.k_proj.weight",
            f"{_HF_LAYER}.self_attn.v_proj.weight",
        ),
        "qkv",
        ("Q D", "K D", "K D"),
    ),
    (f"{_LAYER}.self_attention.q_layernorm.weight", (f"{_HF_LAYER}.self_attn.q_norm.weight",), "replicated", ("H",)),
    (f"{_LAYER}.self_attention.k_layernorm.weight", (f"{_HF_LAYER}.self_attn.k_norm.weight",), "replicated", ("H",)),
    (f"{_LAYER}.self_attention.linear_proj.weight", (f"{_HF_LAYER}.self_attn.o_proj.weight",), "row", ("D Q",)),
    (
        f"{_LAYER}.mlp.linear_fc1.layer_norm_weight",
        (f"{_HF_LAYER}.post_attention_layernorm.weight",),
        "replicated",
        ("D",),
    ),
    (
        f"{_LAYER}.mlp.linear_fc1.weight",
        (f"{_HF_LAYER}.mlp.gate_proj.weight", f"{_HF_LAYER}.mlp.up_proj.weight"),
        "gate_up",
        ("F D", "F D"),
    ),
    (f"{_LAYER}.mlp.linear_fc2.weight", (f"{_HF_LAYER}.mlp.down_proj.weight",), "row", ("D F",)),
    ("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated", ("D",)),
    ("output_layer.weight", ("lm_head.weight",), "vocabulary", ("V D",)),
    ("value_head.weight", ("value_head.weight",), "replicated", ("1 D",)),
    ("vision.patch_embed.weight", ("visual.patch_embed.proj.weight",), "patch", ("E C T P P",)),
    ("vision.patch_embed.bias", ("visual.patch_embed.proj.bias",), "replicated", ("E",)),
    ("vision.pos_embed.weight", ("visual.pos_embed.weight",), "replicated", ("N E",)),
    *_norm(f"{_BLOCK}.self_attention.linear_qkv.layer_norm", f"{_HF_BLOCK}.norm1", "E", "_"),
    *_linear(f"{_BLOCK}.self_attention.linear_qkv", f"{_HF_BLOCK}.attn.qkv", "vision_qkv", "3E", "E"),
    *_linear(f"{_BLOCK}.self_attention.linear_proj", f"{_HF_BLOCK}.attn.proj", "row", "E", "E"),
    *_norm(f"{_BLOCK}.mlp.linear_fc1.layer_norm", f"{_HF_BLOCK}.norm2", "E", "_"),
    *_linear(f"{_BLOCK}.mlp.linear_fc1", f"{_HF_BLOCK}.mlp.linear_fc1", "column", "G", "E"),
    *_linear(f"{_BLOCK}.mlp.linear_fc2", f"{_HF_BLOCK}.mlp.linear_fc2", "row", "E", "G"),
    *_merger("vision.merger", "visual.merger", "E"),
    # Normed after patches are merged: the norm is as wide as its input.
    *_merger("vision.merger.deepstack.{i}", "visual.deepstack_merger_list.{i}", "M"),
)


def stacks(shape: ModelShape) -> Mapping[str, int]:
    """Return for how many parameters a row with ``{i}`` stands, by what stands before ``{i}`` in its name."""
    return {
        "decoder.layers.": shape.layers,
        "vision.layers.": shape.vision.depth,
        "vision.merger.deepstack.": shape.vision.layer_features,
    }


def sizes(shape: ModelShape) -> dict[str, int]:
    """Return the numbers that the letters of `TABLE` stand for."""
    vision = vision_shape(shape)
    return {
        "1": 1,
        "D": shape.hidden,
        "F": shape.ffn,
        "Q": shape.heads * shape.head_dim,
        "K": shape.kv_heads * shape.head_dim,
        "H": shape.head_dim,
        "V": shape.vocab,
        "E": vision.hidden,
        "3E": 3 * vision.hidden,
        "G": vision.ffn,
        "M": vision.hidden * vision.merge**2,
        "N": vision.positions_side**2,
        "C": vision.in_channels,
        "T": vision.temporal_patch,
        "P": vision.patch,
    }
