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
OUTPUT_LAYER = "output_layer.weight"


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
        self,
        rows: Sequence[TensorRow],
        parts: Iterable[nn.Module],
        shape: ModelShape,
        groups: ProcessGroupCollection,
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
                # A tied model has no row for a head: the one that its last stage has is a copy of the embedding.
                is_copy = name == OUTPUT_LAYER and name not in rows_by_name
                row_name = _EMBEDDING if is_copy else name
                holding = Holding(rows_by_name[row_name], parameter, is_copy, adapters.get(local))
                self.holdings.append(holding)
        self._parameters: dict[str, Parameter] = {}
        for holding in self.holdings:
            # Megatron marks shards only where it fills them with random numbers; the gradient norm needs the mark.
            holding.parameter.tensor_model_parallel = cut_dim(holding.row) is not None
            if not holding.is_copy:
                self._parameters[holding.row.megatron] = holding.parameter
        self._stage = self._find_stages()

    def _find_stages(self) -> dict[str, int]:
        """Return the pipeline stage of every row.  A collective."""
        pp = self.groups.pp
        local_names = list(self._parameters)
        # A rank knows its own stage alone, and must receive the rows of the others from the stage that has them.
        names_by_stage: list[list[str]] = [[] for _ in range(pp.size())]
        dist.all_gather_object(names_by_stage, local_names, group=pp)
        stages: dict[str, int] = {}
        for stage, names in enumerate(names_by_stage):
            for name in names:
                stages[name] = stage
        all_names = [row.megatron for row in self.rows]
        missing = [name for name in all_names if name not in stages]
        assert not missing, f"no stage holds {missing}"
        return stages

    def attach(self, optimizer: Any) -> None:
        """Set the optimizer whose state is read and written."""
        # Megatron returns a chain of several optimizers, or a single one.
        self.optimizers = getattr(optimizer, "chained_optimizers", [optimizer])

    # Out -------------------------------------------------------------------------------------------------

    def whole(
        self,
        rows: Sequence[TensorRow],
        which: str,
        dtype: torch.dtype,
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the full tensors of ``rows`` on every rank, under Hugging Face names.  A collective.

        Args:
            rows: in the same order on every rank.
            which: ``weight``, ``gradient``, ``exp_avg``, ``exp_avg_sq`` or ``master``.
            dtype: dtype of what ``which`` names; ranks of other stages allocate by it.
        """
        tp = self.groups.tp
        for row in rows:
            shard = self._shard(row, which, dtype)
            shards = [shard]
            is_cut = cut_dim(row) is not None
            # Replicated rows are whole on every rank: there is nothing to gather.
            if is_cut and tp.size() > 1:
                shards = [torch.empty_like(shard) for _ in range(tp.size())]
                dist.all_gather(shards, shard, group=tp)
            # The full tensors have no name here: they are freed before the next row is gathered.
            yield from zip(row.hf, self._full_tensors(row, shards), strict=True)

    def _full_tensors(self, row: TensorRow, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the Hugging Face tensors of a row from the shards of all tensor-parallel ranks."""
        shape = self.shape
        parameter = join(row, shards, shape)
        return to_hf(row, parameter, shape)

    def _shard(self, row: TensorRow, which: str, dtype: torch.dtype) -> Tensor:
        """Return this tensor-parallel rank's shard of a row, on every pipeline stage.  A collective."""
        pp = self.groups.pp
        stage = self._stage[row.megatron]
        # Ranks of the other stages have no tensor to ask for shape and dtype: both follow from the table and `dtype`.
        if pp.rank() == stage:
            parameter = self._parameters[row.megatron]
            shard = self._read(parameter, which).contiguous()
        else:
            device = torch.cuda.current_device()
            shard_shape = self._shard_shape(row)
            shard = torch.empty(shard_shape, dtype=dtype, device=device)
        if pp.size() > 1:
            dist.broadcast(shard, group=pp, group_src=stage)
        return shard

    def _shard_shape(self, row: TensorRow) -> torch.Size:
        # Meta tensors go through the table without memory of their own.
        meta = torch.device("meta")
        empty = [torch.empty(size, device=meta) for size in row.sizes]
        part = self._part(row, empty)
        return part.shape

    def _read(self, parameter: Parameter, which: str) -> Tensor:
        if which == "weight":
            return parameter.detach()
        local_range = self._local_range(parameter)
        if local_range is None:
            if which == "gradient":
                return parameter.main_grad
            return self._state(parameter, which)
        # The ranges of the data-parallel ranks are disjoint: the sum of tensors that are zero elsewhere joins them.
        numel = parameter.numel()
        full_state = torch.zeros(numel, dtype=torch.float32, device=parameter.device)
        if local_range.stop > local_range.start:
            if which == "gradient":
                gradient = parameter.main_grad.flatten()
                full_state[local_range] = gradient[local_range].float()
            else:
                state = self._state(parameter, which)
                full_state[local_range] = state.flatten()
        dist.all_reduce(full_state, group=self.groups.dp_cp)
        return full_state.view(parameter.shape)

    def held(self, trained: Collection[str]) -> list[LocalShard]:
        """Return this rank's shard of every weight, without copying; a copy of a tied embedding too.

        Adapters are no weights of their own: they come with the weight that they are added to.

        ``trained`` names the rows that are trained.
        """
        shards = []
        for holding, ranges in zip(self._weight_holdings, self._ranges, strict=True):
            row = holding.row
            adapter = holding.adapter
            shard = LocalShard(
                parameter=holding.parameter.detach(),
                dim=cut_dim(row),
                ranges=ranges,
                trained=adapter is not None or row.megatron in trained,
                adapter=None if adapter is None else torch.no_grad()(adapter.delta),
            )
            shards.append(shard)
        return shards

    @cached_property
    def _weight_holdings(self) -> list[Holding]:
        return [holding for holding in self.holdings if not is_adapter(holding.row.megatron)]

    @cached_property
    def _ranges(self) -> list[tuple[RowRange, ...]]:
        """Return the row ranges of every weight."""
        # They follow from the layout, which never changes, and numbering all rows takes a while.
        tp = self.groups.tp
        tp_size = tp.size()
        tp_rank = tp.rank()
        ranges = []
        for holding in self._weight_holdings:
            holding_ranges = row_ranges(holding.row, tp_size, tp_rank, self.shape)
            ranges.append(holding_ranges)
        return ranges

    # In --------------------------------------------------------------------------------------------------

    def put(self, holding: Holding, tensors: Sequence[Tensor], into: Tensor) -> None:
        """Copy this rank's part of the full ``tensors`` of a row into ``into``."""
        part = self._part(holding.row, tensors)
        with torch.no_grad():  # autograd allows no write into a parameter that trains
            into.copy_(part)

    def _part(self, row: TensorRow, tensors: Sequence[Tensor]) -> Tensor:
        shape = self.shape
        tp = self.groups.tp
        full = from_hf(row, tensors, shape)
        return split(row, full, tp.size(), tp.rank(), shape)

    def start_state(self, step: int) -> None:
        """Give every trained parameter Adam's state as it is after ``step`` steps, moments still zero."""
        for wrapped in self.optimizers:
            adam = wrapped.optimizer
            is_torch_adam = isinstance(adam, torch.optim.Adam | torch.optim.AdamW)
            for group in adam.param_groups:
                group["step"] = step  # where the fused Adam of Transformer Engine or Apex counts
                for key in group["params"]:
                    state: dict[str, Tensor] = {}
                    for which in MOMENTS:
                        state[which] = torch.zeros_like(key, dtype=torch.float32)
                    if is_torch_adam:
                        # Torch's own Adam counts for each parameter.
                        state["step"] = torch.tensor(float(step))
                    adam.state[key] = state

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
                # Beside tensors there may be a count of steps.
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
        # Only the distributed optimizer has this map: of parameters to their places in its buffers.
        if not hasattr(self.optimizers[0], "model_param_gbuf_map"):
            return None
        for wrapped in self.optimizers:
            if parameter in wrapped.model_param_gbuf_map:
                range_map = wrapped._get_model_param_range_map(parameter)
                param_range = range_map["param"]
                return slice(param_range.start, param_range.end)
        # A bucket is cut without regard to parameters: of some of them other ranks have all.
        return slice(0, 0)

    def _state(self, parameter: Parameter, which: str) -> Tensor:
        for wrapped in self.optimizers:
            if hasattr(wrapped, "model_param_gbuf_map"):
                if parameter in wrapped.model_param_gbuf_map:
                    sharded_state = wrapped._get_main_param_and_optimizer_states(parameter)
                    key = "param" if which == "master" else which
                    return sharded_state[key]
                continue
            # Beside a bfloat16 parameter Megatron's mixed-precision optimizer has a float32 one, which Adam updates.
            main = getattr(parameter, "main_param", None)
            if which == "master":
                return main
            updated = parameter if main is None else main
            state = wrapped.optimizer.state
            if updated in state:
                return state[updated][which]
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
    suffix = name.removeprefix(prefix)
    layer, rest = suffix.split(".", 1)
    # Megatron counts the layers of every stage from 0.
    global_layer = int(layer) + first_layer
    return f"{prefix}{global_layer}.{rest}"
