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
from ovr_megatron.model.layers import LayerClasses, norm


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

    def up(self) -> Tensor:
        """Return the matrix [O, rows of A] that maps all narrow products to the output."""
        return self.lora_B

    def delta(self) -> Tensor:
        """Return scale * B A, float32 [O, I], in the order of the weight's rows: what the adapted weight has more."""
        # The narrow factor is scaled: the product is the only tensor of the weight's size.
        return (self.up().float() * self.scale) @ self.lora_A.float()

    def add_to(self, output: Tensor, down: Tensor) -> Tensor:
        """Return ``output`` [T, 1, O] with the adapter's part, for the narrow products ``down`` [T, 1, rows of A]."""
        # One operation: the part of the adapter is never a tensor of its own, and the sum is rounded once.
        rows = (down * self.scale).flatten(0, 1)
        return torch.addmm(output.flatten(0, 1), rows, self.up().t()).view_as(output)


class ColumnAdapter(Adapter):
    """Adapter of a column-parallel linear: every rank has all of A, and the rows of B for its output features.

    Args:
        parts: fused tensors, each with its own A.
        part_rows: of one group of output features, the rows of each part; the groups follow one another.
    """

    def __init__(self, in_features: int, parts: int, part_rows: Sequence[int], **settings: Any):
        self.rank = settings["rank"]
        super().__init__(parts * self.rank, in_features, **settings)
        self.part_rows = list(part_rows)
        # Under sequence parallelism a rank's gradient of A comes from its own rows only: Megatron sums marked ones.
        self.lora_A.sequence_parallel = self.sequence_parallel

    def up(self) -> Tensor:
        """Return B as [O, parts * r]: a row reads the narrow product of its own tensor, and zeros beside it."""
        parts = len(self.part_rows)
        if parts == 1:
            return self.lora_B
        # [groups, rows of a group, r]: query heads, key head and value head of a group, or gate and up.
        by_group = self.lora_B.unflatten(0, (-1, sum(self.part_rows)))
        blocks = []
        for index, rows in enumerate(by_group.split(self.part_rows, dim=1)):
            columns_before = index * self.rank
            columns_after = (parts - 1 - index) * self.rank
            blocks.append(F.pad(rows, (columns_before, columns_after)))
        return torch.cat(blocks, dim=1).flatten(0, 1)

    def forward(self, output: Tensor, x: Tensor) -> Tensor:
        """Return the output [T, 1, O] with the adapter's part, for the input [T, 1, I] or this rank's part of its rows.

        Args:
            output: of the layer without the adapter.
            x: the layer's normed input.
        """
        down = F.linear(x, self.lora_A)
        # The narrow product travels between the ranks, not the input.
        if self.sequence_parallel:
            down = gather_from_sequence_parallel_region(down, group=self.group)
        else:
            down = copy_to_tensor_model_parallel_region(down, group=self.group)
        return self.add_to(output, down)


class RowAdapter(Adapter):
    """Adapter of a row-parallel linear: every rank has the columns of A for its input features, and all of B."""

    def __init__(self, in_features: int, **settings: Any):
        super().__init__(settings["rank"], in_features, **settings)
        # As in `ColumnAdapter`, of B: it multiplies this rank's rows only.
        self.lora_B.sequence_parallel = self.sequence_parallel

    def forward(self, output: Tensor, x: Tensor) -> Tensor:
        """Return the output [T, 1, O] with the adapter's part.

        Args:
            output: of the layer without the adapter.
            x: this rank's features [T, 1, I] of the input.
        """
        down = F.linear(x, self.lora_A)
        # The ranks' products are partial sums over the input features.
        if self.sequence_parallel:
            down = reduce_scatter_to_sequence_parallel_region(down, group=self.group)
        else:
            down = reduce_from_tensor_model_parallel_region(down, group=self.group)
        return self.add_to(output, down)


def _normed(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Return the layer's normed input once more, which the layer keeps to itself."""
    if x.is_cuda and bias is None:
        # One kernel in the dtype of ``x``: `rms_norm` would store a float32 copy of it.
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return norm(x, weight, bias, eps)


def with_column_adapter(base: type[Any], lora: LoraConfig, parts: int) -> type[Any]:
    """Return a column-parallel linear class with a `ColumnAdapter`.

    Args:
        base: computes W norm(x) and has the norm's weight as ``layer_norm_weight``, and its bias as
            ``layer_norm_bias``: ours or Transformer Engine's.
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
            # Transformer Engine's layer has no such attribute, or None, where the norm has no bias.
            norm_bias = getattr(self, "layer_norm_bias", None)
            normed = _normed(input_, self.layer_norm_weight, norm_bias, self.norm_eps)
            return self.adapter(output, normed), bias

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
            return self.adapter(output, input_), bias

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
    enabled = [module for module in model.modules() if isinstance(module, Adapter) and module.enabled]
    for adapter in enabled:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in enabled:
            adapter.enabled = True
