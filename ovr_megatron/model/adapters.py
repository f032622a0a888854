"""Low-rank adapters (LoRA, arXiv 2106.09685) in Megatron's linear layers: y = W x + alpha / rank * B (A x).

Where Megatron fuses several Hugging Face tensors into one weight, each of them has its own adapter, as in PEFT: the
down-projections A are stacked, [parts x rank, in], and the rows of the up-projection B, [out, rank], stand in the
fused order of the weight's rows.

Shapes: T rows of a pack, r rank, I and O input and output features, on this rank where a tensor is cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from ovr_megatron.config import LoraConfig
from ovr_megatron.families import ModelShape
from ovr_megatron.families.adapters import adapted_linears
from ovr_megatron.model.layers import LayerClasses, rms_norm


class Adapter(nn.Module):
    """The two matrices of an adapter; `ColumnAdapter` and `RowAdapter` say how ranks cut them.

    Args:
        rows: of ``lora_A``.
        in_features: I, on this rank.
        out_features: O, on this rank.
        rank: r.
        config: of the layers, for dtype and sequence parallelism.
        scale: alpha / r.
        group: the tensor-parallel group.
    """

    def __init__(
        self,
        rows: int,
        in_features: int,
        out_features: int,
        rank: int,
        config: TransformerConfig,
        scale: float,
        group: torch.distributed.ProcessGroup,
    ):
        super().__init__()
        device = torch.cuda.current_device()
        self.lora_A = nn.Parameter(torch.zeros(rows, in_features, dtype=config.params_dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, dtype=config.params_dtype, device=device))
        self.sequence_parallel = config.sequence_parallel
        self.scale = scale
        self.group = group
        self.enabled = True

    def delta(self) -> Tensor:
        """Return scale * B A, float32 [O, I]: what this rank's shard of the weight lacks of the adapted one."""
        return (self.lora_B.float() @ self.lora_A.float()) * self.scale


class ColumnAdapter(Adapter):
    """Adapter of a column-parallel linear: every rank has all of A, and the rows of B for its output features.

    Args:
        parts: fused tensors, each with its own A.
        part_rows: of one group of output features, the rows of each part; the groups follow one another.
    """

    def __init__(self, in_features: int, parts: int, part_rows: Sequence[int], **settings: Any):
        rank = settings["rank"]
        super().__init__(parts * rank, in_features, **settings)
        self.part_rows = list(part_rows)
        # Under sequence parallelism a rank's gradient of A comes from its own rows only: Megatron sums marked ones.
        self.lora_A.sequence_parallel = self.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the output [T, 1, O], for the input [T, 1, I] or this rank's part of its rows."""
        down = F.linear(x, self.lora_A)
        # The narrow product travels between the ranks, not the input.
        if self.sequence_parallel:
            down = gather_from_sequence_parallel_region(down, group=self.group)
        else:
            down = copy_to_tensor_model_parallel_region(down, group=self.group)
        parts = len(self.part_rows)
        if parts == 1:
            return F.linear(down, self.lora_B) * self.scale
        # [groups, rows of a group, r]: query heads, key head and value head of a group, or gate and up.
        by_group = self.lora_B.unflatten(0, (-1, sum(self.part_rows)))
        outputs = []
        for part, rows in zip(down.chunk(parts, dim=-1), by_group.split(self.part_rows, dim=1), strict=True):
            output = F.linear(part, rows.flatten(0, 1))
            outputs.append(output.unflatten(-1, (len(by_group), -1)))
        return torch.cat(outputs, dim=-1).flatten(-2) * self.scale

    def delta(self) -> Tensor:
        """Return scale * B A in the fused order of the weight's rows, float32 [O, I]."""
        down = self.lora_A.float().chunk(len(self.part_rows))
        by_group = self.lora_B.float().unflatten(0, (-1, sum(self.part_rows)))
        up = by_group.split(self.part_rows, dim=1)
        products = [rows @ part for rows, part in zip(up, down, strict=True)]  # [groups, rows of a part, I] each
        return torch.cat(products, dim=1).flatten(0, 1) * self.scale


class RowAdapter(Adapter):
    """Adapter of a row-parallel linear: every rank has the columns of A for its input features, and all of B."""

    def __init__(self, in_features: int, **settings: Any):
        super().__init__(settings["rank"], in_features, **settings)
        # As in `ColumnAdapter`, of B: it multiplies this rank's rows only.
        self.lora_B.sequence_parallel = self.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the output [T, 1, O] for this rank's features [T, 1, I] of the input."""
        down = F.linear(x, self.lora_A)
        # The ranks' products are partial sums over the input features.
        if self.sequence_parallel:
            down = reduce_scatter_to_sequence_parallel_region(down, group=self.group)
        else:
            down = reduce_from_tensor_model_parallel_region(down, group=self.group)
        return F.linear(down, self.lora_B) * self.scale


def with_column_adapter(base: type[Any], lora: LoraConfig, parts: int) -> type[Any]:
    """Return a column-parallel linear class with a `ColumnAdapter`.

    Args:
        base: computes W norm(x) and has the norm's weight as ``layer_norm_weight``: ours or Transformer Engine's.
        lora: rank and scale.
        parts: Hugging Face tensors that the weight fuses: three are query, key and value, two are gate and up.
    """

    class AdaptedColumnLinear(base):
        def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **settings: Any):
            super().__init__(input_size, output_size, config=config, **settings)
            group = settings["tp_group"]
            local_size = output_size // group.size()
            self.adapter = ColumnAdapter(
                input_size,
                parts,
                part_rows(config, local_size, parts),
                out_features=local_size,
                rank=lora.rank,
                config=config,
                scale=lora.scale,
                group=group,
            )
            self.norm_eps = config.layernorm_epsilon

        def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            output, bias = super().forward(input_, *args, **kwargs)
            if not self.adapter.enabled:
                return output, bias
            # The layer keeps its normed input to itself; normalising again costs little beside a product.
            normed = rms_norm(input_, self.layer_norm_weight, self.norm_eps)
            return output + self.adapter(normed), bias

    return AdaptedColumnLinear


def with_row_adapter(base: type[Any], lora: LoraConfig) -> type[Any]:
    """Return a row-parallel linear class with a `RowAdapter`; ``base`` is Megatron's or Transformer Engine's."""

    class AdaptedRowLinear(base):
        def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **settings: Any):
            super().__init__(input_size, output_size, config=config, **settings)
            group = settings["tp_group"]
            self.adapter = RowAdapter(
                input_size // group.size(),
                out_features=output_size,
                rank=lora.rank,
                config=config,
                scale=lora.scale,
                group=group,
            )

        def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            output, bias = super().forward(input_, *args, **kwargs)
            if not self.adapter.enabled:
                return output, bias
            return output + self.adapter(input_), bias

    return AdaptedRowLinear


def adapted_classes(classes: LayerClasses, shape: ModelShape, lora: LoraConfig, tower: bool = False) -> LayerClasses:
    """Return ``classes`` whose linear layers have the adapters that ``lora`` asks for; see `adapted_linears`."""
    linears = adapted_linears(shape, lora, tower)

    def adapt(name: str, base: type[Any]) -> type[Any]:
        if name not in linears:
            return base
        if base is classes.norm_linear:
            return with_column_adapter(base, lora, linears[name])
        return with_row_adapter(base, lora)

    return replace(classes, adapt=adapt)


def part_rows(config: TransformerConfig, out_features: int, parts: int) -> list[int]:
    """Return the rows of each fused tensor within one group of ``out_features`` rows.

    Three tensors are query, key and value: a group is a key-value head with its query heads.  Otherwise there is one
    group.
    """
    if parts == 3:
        queries = config.num_attention_heads // config.num_query_groups
        return [queries * config.kv_channels, config.kv_channels, config.kv_channels]
    return [out_features // parts] * parts


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Let ``model`` compute without its adapters in the block."""
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.enabled = True
