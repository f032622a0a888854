"""Read and write a sharded model as full tensors under Hugging Face names.

A rank holds the rows of its pipeline stage, cut over the tensor-parallel ranks; gradients and Adam's moments may
in turn be cut over the data-parallel ranks (the distributed optimizer).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn
from torch.nn import Parameter

from ovr_megatron.families import ModelShape
from ovr_megatron.families.adapters import is_adapter
from ovr_megatron.model.adapters import Adapter
from ovr_megatron.weights.slices import LocalShard, RowRange, row_ranges
from ovr_megatron.weights.table import TensorRow, cut_dim, from_hf, join, split, to_hf

MOMENTS = ("exp_avg", "exp_avg_sq")
_EMBEDDING = "embedding.word_embeddings.weight"
_HEAD = "output_layer.weight"


@dataclass(frozen=True)
class Holding:
    """A parameter of this rank and the row of the table that it is a part of."""

    row: TensorRow
    parameter: Parameter
    is_copy: bool = False  # the last stage's copy of a tied embedding
    adapter: Adapter | None = None  # beside this weight


class LiveTensors:
    """Reads and writes a model's weights, gradients and optimizer state through the table of weights.

    Args:
        rows: the model's rows of the table.
        parts: this rank's modules; each knows its ``first_layer``.
        shape: the model's sizes.
        groups: its process groups.
    """

    def __init__(
        self, rows: Sequence[TensorRow], parts: Iterable[nn.Module], shape: ModelShape, groups: ProcessGroupCollection
    ):
        self.rows = list(rows)
        self.shape = shape
        self.groups = groups
        self.optimizers: list[Any] = []
        rows_by_name = {row.megatron: row for row in rows}
        self.holdings: list[Holding] = []
        for part in parts:
            adapters = {f"{prefix}.weight": module.adapter for prefix, module in _adapted_modules(part)}
            for local, parameter in part.named_parameters():
                name = _global_name(local, part.first_layer)
                if name == _HEAD and name not in rows_by_name:
                    self.holdings.append(Holding(rows_by_name[_EMBEDDING], parameter, is_copy=True))
                else:
                    self.holdings.append(Holding(rows_by_name[name], parameter, adapter=adapters.get(local)))
        for holding in self.holdings:
            # Megatron marks shards only where it fills them with random numbers; the gradient norm needs the mark.
            holding.parameter.tensor_model_parallel = cut_dim(holding.row) is not None
        self._parameters = {h.row.megatron: h.parameter for h in self.holdings if not h.is_copy}
        self._stage = self._find_stages()

    def _find_stages(self) -> dict[str, int]:
        """Return the pipeline stage of every row.  A collective."""
        names_by_stage: list[list[str]] = [[] for _ in range(self.groups.pp.size())]
        dist.all_gather_object(names_by_stage, list(self._parameters), group=self.groups.pp)
        stages: dict[str, int] = {}
        for stage, names in enumerate(names_by_stage):
            stages |= dict.fromkeys(names, stage)
        missing = [row.megatron for row in self.rows if row.megatron not in stages]
        assert not missing, f"no stage holds {missing}"
        return stages

    def attach(self, optimizer: Any) -> None:
        """Set the optimizer whose state is read and written."""
        self.optimizers = getattr(optimizer, "chained_optimizers", [optimizer])

    # Out -------------------------------------------------------------------------------------------------

    def whole(self, rows: Sequence[TensorRow], which: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield the full tensors of ``rows`` on every rank, under Hugging Face names.  A collective.

        Args:
            rows: in the same order on every rank.
            which: ``weight``, ``gradient``, ``exp_avg``, ``exp_avg_sq`` or ``master``.
            dtype: dtype of what ``which`` names; ranks of other stages allocate by it.
        """
        for row in rows:
            shard = self._shard(row, which, dtype)
            shards = [shard]
            if self.groups.tp.size() > 1 and cut_dim(row) is not None:
                shards = [torch.empty_like(shard) for _ in range(self.groups.tp.size())]
                dist.all_gather(shards, shard, group=self.groups.tp)
            yield from zip(row.hf, to_hf(row, join(row, shards, self.shape), self.shape), strict=True)

    def _shard(self, row: TensorRow, which: str, dtype: torch.dtype) -> Tensor:
        """Return this tensor-parallel rank's shard of a row, on every pipeline stage.  A collective."""
        stage = self._stage[row.megatron]
        # Ranks of the other stages have no tensor to ask for shape and dtype: both follow from the table and `dtype`.
        if self.groups.pp.rank() == stage:
            shard = self._read(self._parameters[row.megatron], which).contiguous()
        else:
            device = torch.cuda.current_device()
            shard = torch.empty(self._shard_shape(row), dtype=dtype, device=device)
        if self.groups.pp.size() > 1:
            dist.broadcast(shard, group=self.groups.pp, group_src=stage)
        return shard

    def _shard_shape(self, row: TensorRow) -> torch.Size:
        empty = [torch.empty(size, device="meta") for size in row.sizes]
        full = from_hf(row, empty, self.shape)
        tp = self.groups.tp
        return split(row, full, tp.size(), tp.rank(), self.shape).shape

    def _read(self, parameter: Parameter, which: str) -> Tensor:
        if which == "weight":
            return parameter.detach()
        local_range = self._local_range(parameter)
        if local_range is None:
            if which == "gradient":
                return parameter.main_grad
            return self._state(parameter, which)
        # The ranges of the data-parallel ranks are disjoint: the sum of tensors that are zero elsewhere joins them.
        full_state = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if local_range.stop > local_range.start:
            if which == "gradient":
                full_state[local_range] = parameter.main_grad.flatten()[local_range].float()
            else:
                full_state[local_range] = self._state(parameter, which).flatten()
        dist.all_reduce(full_state, group=self.groups.dp_cp)
        return full_state.view(parameter.shape)

    def held(self, trained: Collection[str]) -> list[LocalShard]:
        """Return this rank's shard of every weight, without copying; a copy of a tied embedding too.

        Adapters are no weights of their own: they come with the weight that they are added to.

        ``trained`` names the rows that are trained.
        """
        shards: list[LocalShard] = []
        for holding, ranges in zip(self._weight_holdings, self._ranges, strict=True):
            adapter = holding.adapter
            is_trained = adapter is not None or holding.row.megatron in trained
            shards.append(
                LocalShard(
                    holding.parameter.detach(),
                    cut_dim(holding.row),
                    ranges,
                    is_trained,
                    None if adapter is None else torch.no_grad()(adapter.delta),
                )
            )
        return shards

    @cached_property
    def _weight_holdings(self) -> list[Holding]:
        return [holding for holding in self.holdings if not is_adapter(holding.row.megatron)]

    @cached_property
    def _ranges(self) -> list[tuple[RowRange, ...]]:
        """Return the row ranges of every weight."""
        tp = self.groups.tp
        return [row_ranges(holding.row, tp.size(), tp.rank(), self.shape) for holding in self._weight_holdings]

    # In --------------------------------------------------------------------------------------------------

    def put(self, holding: Holding, tensors: Sequence[Tensor], into: Tensor) -> None:
        """Copy this rank's part of the full ``tensors`` of a row into ``into``."""
        with torch.no_grad():  # autograd allows no write into a parameter that trains
            into.copy_(self._part(holding.row, tensors))

    def _part(self, row: TensorRow, tensors: Sequence[Tensor]) -> Tensor:
        full = from_hf(row, tensors, self.shape)
        tp = self.groups.tp
        return split(row, full, tp.size(), tp.rank(), self.shape)

    def start_state(self, step: int) -> None:
        """Give every trained parameter Adam's state as it is after ``step`` steps, moments still zero."""
        for wrapped in self.optimizers:
            adam = wrapped.optimizer
            for group in adam.param_groups:
                group["step"] = step  # where the fused Adam of Transformer Engine or Apex counts
                for key in group["params"]:
                    adam.state[key] = {which: torch.zeros_like(key, dtype=torch.float32) for which in MOMENTS}
                    if isinstance(adam, torch.optim.Adam | torch.optim.AdamW):
                        # Torch's own Adam counts for each parameter.
                        adam.state[key]["step"] = torch.tensor(float(step))

    def state_tensors(self) -> Iterator[Tensor]:
        """Yield the optimizers' own tensors: moments, and the weights that they update (maybe the model's)."""
        for wrapped in self.optimizers:
            adam = getattr(wrapped, "optimizer", None)
            if adam is None:
                continue
            for group in adam.param_groups:
                for key in group["params"]:
                    yield key.data
            for state in adam.state.values():
                for value in state.values():
                    if isinstance(value, Tensor):
                        yield value

    def put_state(self, holding: Holding, which: str, tensors: Sequence[Tensor]) -> None:
        """Copy this rank's part of one of `MOMENTS` or ``master`` from the full ``tensors`` of a row."""
        part = self._part(holding.row, tensors)
        local_range = self._local_range(holding.parameter)
        if local_range is not None:
            part = part.flatten()[local_range]
            if not part.numel():
                return
        with torch.no_grad():
            target = self._state(holding.parameter, which)
            target.copy_(part.view(target.shape))

    # Where Megatron keeps it -----------------------------------------------------------------------------

    def _local_range(self, parameter: Parameter) -> slice | None:
        """Return the range of the flat parameter whose state this rank keeps; None if it keeps all."""
        if not hasattr(self.optimizers[0], "model_param_gbuf_map"):
            return None
        for wrapped in self.optimizers:
            if parameter in wrapped.model_param_gbuf_map:
                param_range = wrapped._get_model_param_range_map(parameter)["param"]
                return slice(param_range.start, param_range.end)
        return slice(0, 0)

    def _state(self, parameter: Parameter, which: str) -> Tensor:
        for wrapped in self.optimizers:
            if hasattr(wrapped, "model_param_gbuf_map"):
                if parameter in wrapped.model_param_gbuf_map:
                    state = wrapped._get_main_param_and_optimizer_states(parameter)
                    return state["param" if which == "master" else which]
                continue
            main = getattr(parameter, "main_param", None)
            if which == "master":
                return main
            key = parameter if main is None else main
            if key in wrapped.optimizer.state:
                return wrapped.optimizer.state[key][which]
        raise KeyError(f"no optimizer state {which}: no step has been taken, or the parameter is frozen")


def _adapted_modules(part: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the linear layers that have an adapter, by their names in ``part``."""
    for name, module in part.named_modules():
        if isinstance(getattr(module, "adapter", None), Adapter):
            yield name, module


def _global_name(name: str, first_layer: int) -> str:
    """Return the name in the full model of a parameter of one pipeline stage."""
    prefix = "decoder.layers."
    if not name.startswith(prefix):
        return name
    layer, rest = name.removeprefix(prefix).split(".", 1)
    return f"{prefix}{int(layer) + first_layer}.{rest}"
