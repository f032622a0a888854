"""The table of weights: how every Megatron parameter is made from Hugging Face tensors, and back.

One row per Megatron parameter, as data.  Import, export, averaging and the live update of vLLM read the
same rows; the four functions `from_hf`, `to_hf`, `split` and `join` are pure, exact (they only move
numbers) and inverse to each other.  They work on parameters, gradients and meta tensors alike, on weights
[out, in] and biases [out].

Hugging Face names are the hub's (``visual.*``, ``model.layers.*``); `canonical` maps the names that
Transformers 5 gives its modules (``model.visual.*``, ``model.language_model.*``) to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ovr_megatron.errors import UserError
from ovr_megatron.model.shape import ModelShape

# Megatron parameter, Hugging Face tensors, kind, size of each Hugging Face tensor.
# Language model: D width, F feed-forward, Q queries (heads x head size), K keys or values, V vocabulary.
# Vision tower: E width, G feed-forward, M merged width (E x merge^2), C channels, T frames and P pixels of a patch.
_TABLE: tuple[tuple[str, tuple[str, ...], str, tuple[str, ...]], ...] = (
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

_NEW_PREFIXES = (("model.visual.", "visual."), ("model.language_model.", "model."))


class LayoutError(UserError, ValueError):
    """A tensor-parallel size that the model's sizes do not allow; names both."""


@dataclass(frozen=True)
class TensorRow:
    """One Megatron parameter: the Hugging Face tensors it holds, how they are fused and cut, and their sizes."""

    megatron: str
    hf: tuple[str, ...]
    kind: str
    sizes: tuple[tuple[int, ...], ...]


def canonical(name: str) -> str:
    """The hub's name of a Hugging Face tensor, from either generation of names."""
    for new, hub in _NEW_PREFIXES:
        if name.startswith(new):
            return hub + name.removeprefix(new)
    return name


def rows(shape: ModelShape, critic: bool = False) -> list[TensorRow]:
    """Every parameter of the model, layers expanded.

    A policy has ``output_layer.weight`` unless its embedding is tied; a critic has ``value_head.weight`` instead.
    """
    absent = {"output_layer.weight"} if critic or shape.tied else set()
    absent |= set() if critic else {"value_head.weight"}
    sizes = _sizes(shape)
    expanded = []
    for megatron, hf, kind, terms in _TABLE:
        if megatron in absent:
            continue
        depth = shape.vision.depth if megatron.startswith("vision.") else shape.layers
        dims = tuple(tuple(sizes[letter] for letter in term.split()) for term in terms)
        for i in range(depth if "{i}" in megatron else 1):
            expanded.append(TensorRow(megatron.format(i=i), tuple(name.format(i=i) for name in hf), kind, dims))
    return expanded


def _sizes(shape: ModelShape) -> dict[str, int]:
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


def padded_vocab(shape: ModelShape, tp: int) -> int:
    """Rows of the embedding and the output layer, over all ranks, when cut over ``tp`` of them."""
    return math.ceil(shape.vocab / tp) * tp


def cut_dim(row: TensorRow) -> int | None:
    """The dimension that tensor-parallel ranks cut, or None where every rank holds the whole parameter."""
    return _KINDS[row.kind].dim


def from_hf(row: TensorRow, tensors: Sequence[Tensor], shape: ModelShape) -> Tensor:
    """The whole Megatron parameter (vocabulary not padded) of the Hugging Face tensors, in the order of ``row.hf``.

    The result may share memory with the input.
    """
    return _KINDS[row.kind].fuse(tensors, shape)


def to_hf(row: TensorRow, tensor: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
    """The Hugging Face tensors, in the order of ``row.hf``, of a whole Megatron parameter; inverse of `from_hf`."""
    return _KINDS[row.kind].unfuse(tensor, shape)


def split(row: TensorRow, tensor: Tensor, tp: int, rank: int, shape: ModelShape) -> Tensor:
    """The part of a whole parameter that tensor-parallel ``rank`` of ``tp`` holds; vocabulary rows padded with zeros.

    Raises:
        LayoutError: ``tp`` does not divide what this parameter is cut by (key-value groups, heads, features).
    """
    kind = _KINDS[row.kind]
    if kind.dim is None or tp == 1:
        return tensor
    if row.kind == "vocabulary":
        padding = padded_vocab(shape, tp) - tensor.shape[0]
        tensor = torch.cat([tensor, tensor.new_zeros(padding, *tensor.shape[1:])])
    units, what = _units(row, tensor, shape)
    if units % tp:
        fits = ", ".join(str(size) for size in range(1, tp) if not units % size)
        raise LayoutError(f"{row.megatron}: tp={tp} does not divide the {units} {what}; tp can be {fits}")
    cut = tensor.unflatten(kind.dim, (kind.blocks, tp, -1))
    return cut.select(kind.dim + 1, rank).flatten(kind.dim, kind.dim + 1)


def _units(row: TensorRow, tensor: Tensor, shape: ModelShape) -> tuple[int, str]:
    """What a rank must hold a whole number of: how many there are, and their name."""
    if row.kind == "qkv":
        return shape.kv_heads, "key-value heads"
    if row.kind == "vision_qkv":
        return shape.vision.heads, "vision heads"
    kind = _KINDS[row.kind]
    assert kind.dim is not None
    return tensor.shape[kind.dim] // kind.blocks, "features"


def join(row: TensorRow, shards: Sequence[Tensor], shape: ModelShape) -> Tensor:
    """Return the entire parameter of the parts of all ranks, padding removed; inverse of `split`."""
    kind = _KINDS[row.kind]
    if kind.dim is None or len(shards) == 1:
        return shards[0]
    parts = [shard.unflatten(kind.dim, (kind.blocks, -1)) for shard in shards]
    joined = torch.stack(parts, dim=kind.dim + 1).flatten(kind.dim, kind.dim + 2)
    return joined[: shape.vocab] if row.kind == "vocabulary" else joined


def _same(tensors: Sequence[Tensor], shape: ModelShape) -> Tensor:
    return tensors[0]


def _alone(tensor: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
    return (tensor,)


def _fuse_qkv(tensors: Sequence[Tensor], shape: ModelShape) -> Tensor:
    return _group(tensors, shape.kv_heads)


def _unfuse_qkv(tensor: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
    return _ungroup(tensor, shape.kv_heads, shape.heads // shape.kv_heads)


def _fuse_vision_qkv(tensors: Sequence[Tensor], shape: ModelShape) -> Tensor:
    return _group(tensors[0].chunk(3), shape.vision.heads)


def _unfuse_vision_qkv(tensor: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
    return (torch.cat(_ungroup(tensor, shape.vision.heads, 1)),)


def _group(qkv: Sequence[Tensor], groups: int) -> Tensor:
    """Rows in Megatron's order: for each key-value group its query heads, its key head, its value head."""
    return torch.cat([part.unflatten(0, (groups, -1)) for part in qkv], dim=1).flatten(0, 1)


def _ungroup(tensor: Tensor, groups: int, queries: int) -> tuple[Tensor, ...]:
    """Query, key and value rows; a group has ``queries`` query heads."""
    heads = tensor.unflatten(0, (groups, queries + 2, -1))
    return tuple(part.flatten(0, 2) for part in heads.split([queries, 1, 1], dim=1))


def _fuse_gate_up(tensors: Sequence[Tensor], shape: ModelShape) -> Tensor:
    return torch.cat(list(tensors))


def _unfuse_gate_up(tensor: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
    return tensor.chunk(2)


def _fuse_patch(tensors: Sequence[Tensor], shape: ModelShape) -> Tensor:
    return tensors[0].flatten(1)


def _unfuse_patch(tensor: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
    vision = shape.vision
    return (tensor.unflatten(1, (vision.in_channels, vision.temporal_patch, vision.patch, vision.patch)),)


@dataclass(frozen=True)
class _Kind:
    """How a parameter is fused, and along which dimension ranks cut it.

    ``dim`` None: every rank holds all of it.  ``blocks``: parts stacked along ``dim`` that are cut each for itself.
    """

    fuse: Callable[[Sequence[Tensor], ModelShape], Tensor] = _same
    unfuse: Callable[[Tensor, ModelShape], tuple[Tensor, ...]] = _alone
    dim: int | None = None
    blocks: int = 1


_KINDS = {
    "replicated": _Kind(),
    "vocabulary": _Kind(dim=0),
    "column": _Kind(dim=0),
    "row": _Kind(dim=1),
    "qkv": _Kind(_fuse_qkv, _unfuse_qkv, dim=0),
    "vision_qkv": _Kind(_fuse_vision_qkv, _unfuse_vision_qkv, dim=0),
    "gate_up": _Kind(_fuse_gate_up, _unfuse_gate_up, dim=0, blocks=2),
    "patch": _Kind(_fuse_patch, _unfuse_patch),
}
