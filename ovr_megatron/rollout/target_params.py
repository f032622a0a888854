"""Describe vLLM's parameters on this rank as rows of Hugging Face tensors, whatever the engine's layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from ovr_megatron.weights.slices import RowRange, ShardLayout

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass
class TargetParam:
    """A parameter of vLLM on this rank.

    Attributes:
        name: vLLM's name.
        module: The module that holds it.
        attribute: Its name in the module.
        shape: Its shape on this rank, also where vLLM keeps only a packed copy.
        dim: The sharded dimension; None if its ranges are those of the flattened parameter.
        ranges: The rows of Hugging Face tensors that it consists of.
        packing_modules: Layers that multiply with a packed copy of it.
    """

    name: str
    module: nn.Module
    attribute: str
    shape: tuple[int, ...]
    dim: int | None
    ranges: tuple[RowRange, ...]
    packing_modules: list[nn.Module]

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself; without elements where only the packed copy exists."""
        return getattr(self.module, self.attribute)

    def layout(self) -> ShardLayout:
        """Return the description that other ranks plan with."""
        return ShardLayout(self.dim, 0, self.parameter.dtype, True, self.ranges)


def target_params(model: nn.Module) -> Iterator[TargetParam]:
    """Yield every parameter of vLLM's model on this rank with its rows of Hugging Face tensors.

    The source of each rule is the class in vLLM's ``model_executor/layers`` that it names.
    """
    targets: dict[int, TargetParam] = {}  # by identity: a tied parameter has several names
    for prefix, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            key = id(parameter)
            if key not in targets:
                name = f"{prefix}.{attribute}"
                shape, dim, ranges = _layout(name, module, parameter)
                targets[key] = TargetParam(
                    name,
                    module,
                    attribute,
                    shape,
                    dim,
                    ranges,
                    packing_modules=[],
                )
            # vLLM's mark of a layer that multiplies with a packed copy on a CPU.
            if attribute == "weight" and hasattr(module, "cpu_linear"):
                targets[key].packing_modules.append(module)
    yield from targets.values()


def _layout(
    name: str,
    module: nn.Module,
    parameter: nn.Parameter,
) -> tuple[tuple[int, ...], int | None, tuple[RowRange, ...]]:
    """Return a parameter's shape on this rank, its sharded dimension and its row ranges."""
    hf_name = name.removeprefix("language_model.")
    shape = tuple(parameter.shape)
    is_matrix = name.endswith(".weight")
    if isinstance(module, LinearBase) and is_matrix:  # a weight that exists only in packed form has no shape of its own
        shape = (module.output_size_per_partition, module.input_size_per_partition)
    if isinstance(module, QKVParallelLinear):
        ranges = _qkv_ranges(_hf_names(hf_name), module)
        return shape, 0, tuple(ranges)
    if isinstance(module, MergedColumnParallelLinear):
        ranges = _merged_ranges(_hf_names(hf_name), module)
        return shape, 0, tuple(ranges)
    if isinstance(module, ColumnParallelLinear):
        size = shape[0]
        rows = RowRange(hf_name, module.tp_rank * size, 0, size)
        return shape, 0, (rows,)
    # The bias of a row-parallel layer is not sharded: it belongs to the sum over the ranks.
    if isinstance(module, RowParallelLinear) and is_matrix:
        size = shape[1]
        rows = RowRange(hf_name, module.tp_rank * size, 0, size)
        return shape, 1, (rows,)
    if isinstance(module, VocabParallelEmbedding):
        # Without the padding that vLLM adds to a vocabulary: the Hugging Face tensor has no such rows.
        first = module.shard_indices.org_vocab_start_index
        end = module.shard_indices.org_vocab_end_index
        rows = RowRange(hf_name, first, 0, end - first)
        return shape, 0, (rows,)
    elements = RowRange(hf_name, 0, 0, torch.Size(shape).numel())
    return shape, None, (elements,)


def _hf_names(name: str) -> list[str]:
    """Return the Hugging Face tensors that vLLM fuses into the parameter of this name."""
    for fused, parts in _FUSED.items():
        if fused in name:
            return [name.replace(fused, part) for part in parts]
    return [name]


def _merged_ranges(names: Sequence[str], module: MergedColumnParallelLinear) -> Iterator[RowRange]:
    """Yield this rank's rows of tensors that vLLM puts below each other, one range for each."""
    offset = 0  # in vLLM's parameter
    for name, full_size in zip(names, module.output_sizes, strict=True):
        size = full_size // module.tp_size
        yield RowRange(name, module.tp_rank * size, offset, size)
        offset += size


def _qkv_ranges(names: Sequence[str], module: QKVParallelLinear) -> Iterator[RowRange]:
    """Yield the query, key and value rows of three Hugging Face tensors, or of one that stacks them (vision)."""
    is_stacked = len(names) == 1
    # More ranks than key-value heads: neighbours hold the same one.
    kv_rank = module.tp_rank // module.num_kv_head_replicas
    query = (module.num_heads, module.total_num_heads, module.tp_rank)
    key_value = (module.num_kv_heads, module.total_num_kv_heads, kv_rank)
    offset = 0  # in vLLM's parameter
    stacked_offset = 0  # in the stacked tensor
    for i, (count, total, rank) in enumerate((query, key_value, key_value)):
        size = count * module.head_size
        start = rank * size
        if is_stacked:
            yield RowRange(names[0], stacked_offset + start, offset, size)
        else:
            yield RowRange(names[i], start, offset, size)
        offset += size
        stacked_offset += total * module.head_size
