"""The table of weights: how every Megatron parameter is made from Hugging Face tensors, and back.

One row per Megatron parameter, as data of the model's family (`Family.weight_table`).  Import, export,
averaging and the live update of vLLM read the same rows; the four functions `from_hf`, `to_hf`, `split` and
`join` are pure, exact (they only move numbers) and inverse to each other.  They work on parameters, gradients
and meta tensors alike, on weights [out, in] and biases [out].

Hugging Face names are the hub's (``visual.*``, ``model.layers.*``); `canonical` maps the names that
Transformers 5 gives its modules (``model.visual.*``, ``model.language_model.*``) to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ovr_megatron.errors import UserError
from ovr_megatron.families import ModelShape, family_of

if TYPE_CHECKING:
    from torch import Tensor

_NEW_PREFIXES = (("model.visual.", "visual."), ("model.language_model.", "model."))
PEFT_PREFIX = "base_model.model."  # before the name of an adapter's module


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
    """The hub's name of a Hugging Face tensor, from either generation of names.

    Of an adapter's tensor it is the name that PEFT gives it with Transformers 5.
    """
    if name.startswith(PEFT_PREFIX):
        return PEFT_PREFIX + module_name(canonical(name.removeprefix(PEFT_PREFIX)))
    for new, hub in _NEW_PREFIXES:
        if name.startswith(new):
            suffix = name.removeprefix(new)
            return f"{hub}{suffix}"
    return name


def module_name(name: str) -> str:
    """Return the name that Transformers 5 gives the parameter with the hub's name ``name``; inverse of `canonical`."""
    for new, hub in _NEW_PREFIXES:
        if name.startswith(hub):
            return new + name.removeprefix(hub)
    return name


def published_name(name: str, shape: ModelShape) -> str:
    """Return the name that the published folders of the model's family give the tensor with the hub's name ``name``."""
    return module_name(name) if family_of(shape).has_module_names else name


def rows(shape: ModelShape, critic: bool = False) -> list[TensorRow]:
    """Every parameter of the model, layers expanded.

    A policy has ``output_layer.weight`` unless its embedding is tied; a critic has ``value_head.weight`` instead.
    """
    absent: set[str] = set()
    if critic or shape.tied:
        absent.add("output_layer.weight")
    if not critic:
        absent.add("value_head.weight")
    family = family_of(shape)
    sizes = family.weight_sizes(shape)
    stacks = family.weight_stacks(shape)
    expanded = []
    for megatron, hf, kind, terms in family.weight_table:
        if megatron in absent:
            continue
        dims = []
        for term in terms:
            letters = term.split()
            term_sizes = [sizes[letter] for letter in letters]
            dims.append(tuple(term_sizes))
        stack, is_stacked, _ = megatron.partition("{i}")
        copies = stacks[stack] if is_stacked else 1
        for i in range(copies):
            hf_names = [name.format(i=i) for name in hf]
            row = TensorRow(
                megatron=megatron.format(i=i),
                hf=tuple(hf_names),
                kind=kind,
                sizes=tuple(dims),
            )
            expanded.append(row)
    return expanded


def padded_vocab(shape: ModelShape, tp: int) -> int:
    """Rows of the embedding and the output layer, over all ranks, when cut over ``tp`` of them."""
    rank_rows = math.ceil(shape.vocab / tp)
    return rank_rows * tp


def cut_dim(row: TensorRow) -> int | None:
    """The dimension that tensor-parallel ranks cut, or None where every rank holds the whole parameter."""
    kind = _KINDS[row.kind]
    return kind.dim


def from_hf(row: TensorRow, tensors: Sequence[Tensor], shape: ModelShape) -> Tensor:
    """The whole Megatron parameter (vocabulary not padded) of the Hugging Face tensors, in the order of ``row.hf``.

    The result may share memory with the input.
    """
    kind = _KINDS[row.kind]
    return kind.fuse(tensors, shape)


def to_hf(row: TensorRow, tensor: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
    """The Hugging Face tensors, in the order of ``row.hf``, of a whole Megatron parameter; inverse of `from_hf`."""
    kind = _KINDS[row.kind]
    return kind.unfuse(tensor, shape)


def split(
    row: TensorRow,
    tensor: Tensor,
    tp: int,
    rank: int,
    shape: ModelShape,
) -> Tensor:
    """The part of a whole parameter that tensor-parallel ``rank`` of ``tp`` holds; vocabulary rows padded with zeros.

    Raises:
        LayoutError: ``tp`` does not divide what this parameter is cut by (key-value groups, heads, features).
    """
    kind = _KINDS[row.kind]
    dim = kind.dim
    if dim is None or tp == 1:
        return tensor
    if row.kind == "vocabulary":
        # Megatron gives every rank equally many rows of the vocabulary; no token has those of the padding.
        vocab, *width = tensor.shape
        padding_rows = padded_vocab(shape, tp) - vocab
        padding = tensor.new_zeros(padding_rows, *width)
        tensor = _cat([tensor, padding])
    # A rank holds whole heads, as attention works on them; of key-value heads, each with its query heads.
    units, unit_name = _units(row, tensor, shape)
    if units % tp:
        smaller_sizes = range(1, tp)
        divisors = [str(size) for size in smaller_sizes if not units % size]
        fits = ", ".join(divisors)
        raise LayoutError(f"{row.megatron}: tp={tp} does not divide the {units} {unit_name}; tp can be {fits}")
    # [blocks, tp, -1]: gate and up are cut each for itself, so that a rank multiplies columns that belong together.
    block_sizes = (kind.blocks, tp, -1)
    shards = tensor.unflatten(dim, block_sizes)
    shard = shards.select(dim + 1, rank)
    return shard.flatten(dim, dim + 1)


def _units(row: TensorRow, tensor: Tensor, shape: ModelShape) -> tuple[int, str]:
    """What a rank must hold a whole number of: how many there are, and their name."""
    if row.kind == "qkv":
        return shape.kv_heads, "key-value heads"
    if row.kind == "vision_qkv":
        return shape.vision.heads, "vision heads"
    kind = _KINDS[row.kind]
    assert kind.dim is not None
    size = tensor.shape[kind.dim]
    return size // kind.blocks, "features"


def join(row: TensorRow, shards: Sequence[Tensor], shape: ModelShape) -> Tensor:
    """Return the entire parameter of the parts of all ranks, padding removed; inverse of `split`."""
    kind = _KINDS[row.kind]
    dim = kind.dim
    if dim is None or len(shards) == 1:
        return shards[0]
    block_sizes = (kind.blocks, -1)
    parts = [shard.unflatten(dim, block_sizes) for shard in shards]
    stacked = _cat([part.unsqueeze(dim + 1) for part in parts], dim + 1)  # [blocks, tp, -1], as in `split`
    joined = stacked.flatten(dim, dim + 2)
    if row.kind == "vocabulary":
        return joined[: shape.vocab]
    return joined


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    # Imported here: names and sizes of the table are there without torch, which takes seconds to load.
    import torch  # noqa: PLC0415

    joined: Tensor = torch.cat(list(tensors), dim=dim)
    return joined


def _same(tensors: Sequence[Tensor], shape: ModelShape) -> Tensor:
    return tensors[0]


def _alone(tensor: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
    return (tensor,)


def _fuse_qkv(tensors: Sequence[Tensor], shape: ModelShape) -> Tensor:
    return _group(tensors, shape.kv_heads)


def _unfuse_qkv(tensor: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
    groups = shape.kv_heads
    queries = shape.heads // groups
    return _ungroup(tensor, groups, queries)


def _fuse_vision_qkv(tensors: Sequence[Tensor], shape: ModelShape) -> Tensor:
    # Hugging Face stacks all query heads, all key heads and all value heads in one tensor.
    qkv = tensors[0].chunk(3)
    heads = shape.vision.heads
    return _group(qkv, heads)


def _unfuse_vision_qkv(tensor: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
    heads = shape.vision.heads
    qkv = _ungroup(tensor, heads, 1)
    stacked = _cat(qkv)
    return (stacked,)


def _group(qkv: Sequence[Tensor], groups: int) -> Tensor:
    """Rows in Megatron's order: for each key-value group its query heads, its key head, its value head."""
    group_sizes = (groups, -1)
    by_group = [part.unflatten(0, group_sizes) for part in qkv]
    grouped = _cat(by_group, dim=1)
    return grouped.flatten(0, 1)


def _ungroup(tensor: Tensor, groups: int, queries: int) -> tuple[Tensor, ...]:
    """Query, key and value rows; a group has ``queries`` query heads."""
    group_heads = queries + 2  # and one key head and one value head
    group_sizes = (groups, group_heads, -1)
    heads = tensor.unflatten(0, group_sizes)
    qkv = heads.split([queries, 1, 1], dim=1)
    flat = [part.flatten(0, 2) for part in qkv]
    return tuple(flat)


def _fuse_gate_up(tensors: Sequence[Tensor], shape: ModelShape) -> Tensor:
    return _cat(tensors)


def _unfuse_gate_up(tensor: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
    return tensor.chunk(2)


def _stack(tensors: Sequence[Tensor], shape: ModelShape) -> Tensor:
    return _cat(tensors)


def _unstack_2(tensor: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
    return tensor.chunk(2)


def _unstack_3(tensor: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
    return tensor.chunk(3)


def _fuse_patch(tensors: Sequence[Tensor], shape: ModelShape) -> Tensor:
    return tensors[0].flatten(1)


def _unfuse_patch(tensor: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
    # Hugging Face's weight is that of a convolution, whose stride is its kernel: a matrix times a patch.
    vision = shape.vision
    patch = vision.patch
    kernel = (vision.in_channels, vision.temporal_patch, patch, patch)
    convolution = tensor.unflatten(1, kernel)
    return (convolution,)


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
    # Down-projections of adapters, one for each Hugging Face tensor of the weight.
    "stacked_1": _Kind(),
    "stacked_2": _Kind(_stack, _unstack_2),
    "stacked_3": _Kind(_stack, _unstack_3),
    "vocabulary": _Kind(dim=0),
    "column": _Kind(dim=0),
    "row": _Kind(dim=1),
    "qkv": _Kind(_fuse_qkv, _unfuse_qkv, dim=0),
    "vision_qkv": _Kind(_fuse_vision_qkv, _unfuse_vision_qkv, dim=0),
    "gate_up": _Kind(_fuse_gate_up, _unfuse_gate_up, dim=0, blocks=2),
    "patch": _Kind(_fuse_patch, _unfuse_patch),
}
