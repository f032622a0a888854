"""Plan the transfers of weights between ranks that shard the same Hugging Face tensors differently.

Trainer and engine both describe their parameters as ranges of consecutive rows of Hugging Face tensors; the
intersections of these ranges are the transfers.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ovr_megatron.families import ModelShape
from ovr_megatron.weights.table import TensorRow, cut_dim, from_hf, split

_ALIGNMENT = 16  # bytes; a view of any dtype needs its transfer to begin at a multiple of its item size


class SliceError(ValueError):
    """A range that a rank needs and no rank holds, or that its holder shards along another dimension."""


class RowRange(NamedTuple):
    """Rows ``start`` to ``start + length`` of a Hugging Face tensor, stored from row ``offset`` of a parameter."""

    tensor: str
    start: int
    offset: int
    length: int


@dataclass(frozen=True)
class LocalShard:
    """A parameter of this rank and its row ranges along ``dim`` (None: ranges of the flattened parameter).

    ``adapter`` returns what an adapter adds to the parameter, in float32, where there is one.
    """

    parameter: Tensor
    dim: int | None
    ranges: tuple[RowRange, ...]
    trained: bool = True
    adapter: Callable[[], Tensor] | None = None

    def merged(self) -> Tensor:
        """Return the parameter with its adapter added, rounded once; the parameter itself where there is none."""
        if self.adapter is None:
            return self.parameter
        # In place of the adapter's product, which is float32 and a tensor of its own.
        return self.adapter().add_(self.parameter).to(self.parameter.dtype)

    def layout(self) -> ShardLayout:
        """Return the description that other ranks plan with."""
        parameter = self.parameter
        if self.dim is None:
            row_count = parameter.numel()
        else:
            row_count = parameter.shape[self.dim]
        return ShardLayout(
            dim=self.dim,
            row_bytes=parameter.nbytes // max(row_count, 1),
            dtype=parameter.dtype,
            trained=self.trained,
            ranges=self.ranges,
        )


class ShardLayout(NamedTuple):
    """A parameter of some rank without its data: sharded dimension, bytes per row, dtype and row ranges."""

    dim: int | None
    row_bytes: int
    dtype: torch.dtype
    trained: bool
    ranges: tuple[RowRange, ...]


class Transfer(NamedTuple):
    """``length`` rows from ``source_offset`` on rank ``source`` to ``target_offset`` on rank ``target``.

    ``source_index`` and ``target_index`` are the positions of the parameters in the lists of the two ranks.
    The order of the fields is the order in which the transfers of a parameter travel.
    """

    source: int
    source_index: int
    source_offset: int
    target: int
    target_index: int
    target_offset: int
    length: int
    row_bytes: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in the source's dtype."""
        return self.length * self.row_bytes

    @property
    def padded_bytes(self) -> int:
        """Bytes that the transfer takes in a bucket."""
        units = -(-self.nbytes // _ALIGNMENT)
        return units * _ALIGNMENT


@dataclass
class TransferStep:
    """The transfers of one bucket on this rank.

    Attributes:
        sends: Transfers to other ranks.
        receives: Transfers from other ranks.
        copies: Transfers within this rank; they take no space in the bucket.
        complete: Indices of the parameters that have all of their rows after this step.
    """

    sends: list[Transfer] = field(default_factory=list)
    receives: list[Transfer] = field(default_factory=list)
    copies: list[Transfer] = field(default_factory=list)
    complete: list[int] = field(default_factory=list)


def row_ranges(
    row: TensorRow,
    tp: int,
    rank: int,
    shape: ModelShape,
) -> tuple[RowRange, ...]:
    """Return the ranges of a Megatron parameter on tensor-parallel ``rank`` of ``tp``, without its padding rows.

    They are read off numbered rows that went through the table, so that the layout is described in one place only.
    """
    dim = cut_dim(row)
    if dim is None:
        (name,) = row.hf
        (size,) = row.sizes
        numel = torch.Size(size).numel()
        return (RowRange(name, 0, 0, numel),)
    lengths = [size[dim] for size in row.sizes]
    starts = [0, *accumulate(lengths[:-1])]
    numbered = []
    for start, length in zip(starts, lengths, strict=True):
        first_number = start + 1  # 0 is padding
        numbers = torch.arange(first_number, first_number + length)
        numbered.append(numbers.unsqueeze(1 - dim))
    full = from_hf(row, numbered, shape)
    part = split(row, full, tp, rank, shape)
    local = part.flatten()
    # A run of consecutive numbers ends where the next number is not one more.
    is_break = local.diff() != 1
    break_indices = is_break.nonzero().flatten()
    run_starts = break_indices + 1
    bounds = [0, *run_starts.tolist(), len(local)]
    ranges = []
    for begin, end in pairwise(bounds):
        offset = begin
        source_row = int(local[begin]) - 1
        # Consecutive rows may go on from one Hugging Face tensor to the next: a range ends with its tensor.
        while offset < end and source_row >= 0:
            tensor = bisect_right(starts, source_row) - 1
            tensor_start = starts[tensor]
            tensor_end = tensor_start + lengths[tensor]
            length = min(end - offset, tensor_end - source_row)
            first_row = source_row - tensor_start
            rows = RowRange(row.hf[tensor], first_row, offset, length)
            ranges.append(rows)
            offset += length
            source_row += length
    return tuple(ranges)


def rows_of(tensor: Tensor, dim: int | None, first: int, length: int) -> Tensor:
    """Return a view of the rows along ``dim`` of a parameter (None: of the flattened parameter)."""
    if dim is None:
        flat = tensor.view(-1)
        return flat[first : first + length]
    return tensor.narrow(dim, first, length)


class _Location(NamedTuple):
    """Where a rank holds an interval of rows: the index of its parameter, and the rows' offset in it."""

    parameter_index: int
    offset: int


_Interval = tuple[int, int]  # first row, and the one after the last
_Locations = dict[int, _Location]  # by rank


class _NearestRows(NamedTuple):
    """Rows from a position on: their rank, its parameter, their offset in it, and where the interval ends."""

    rank: int
    parameter_index: int
    offset: int
    stop: int


class Owners:
    """Index of the ranks that hold each range of every Hugging Face tensor.

    A rank takes rows from the nearest one that holds them; ranks that hold nothing share the others equally.

    Args:
        layouts: Of each rank, the parameters that it holds.
    """

    def __init__(self, layouts: Sequence[Sequence[ShardLayout]]):
        self.layouts = layouts
        by_tensor: dict[str, dict[_Interval, _Locations]] = {}
        for rank, rank_layouts in enumerate(layouts):
            for index, layout in enumerate(rank_layouts):
                for rows in layout.ranges:
                    interval = (rows.start, rows.start + rows.length)
                    by_interval = by_tensor.setdefault(rows.tensor, {})
                    by_rank = by_interval.setdefault(interval, {})
                    location = _Location(index, rows.offset)
                    by_rank.setdefault(rank, location)
        # Sorted once: every transfer of every rank asks for them.
        self._intervals: dict[str, list[tuple[_Interval, _Locations]]] = {}
        self._ranks: dict[tuple[str, _Interval], list[int]] = {}
        for name, by_interval in by_tensor.items():
            self._intervals[name] = sorted(by_interval.items())
            for interval, by_rank in by_interval.items():
                self._ranks[name, interval] = sorted(by_rank)

    def transfers(self, layout: ShardLayout, index: int, target: int) -> Iterator[Transfer]:
        """Yield the transfers that fill parameter ``index`` of rank ``target``, each from the nearest rank.

        Raises:
            SliceError: no rank holds the rows, or the holder shards them along another dimension.
        """
        for rows in layout.ranges:
            position = rows.start
            end = rows.start + rows.length
            while position < end:
                source = self._nearest(rows.tensor, position, target)
                source_layouts = self.layouts[source.rank]
                source_layout = source_layouts[source.parameter_index]
                if source_layout.dim != layout.dim:
                    raise SliceError(
                        f"{rows.tensor} is cut along {source_layout.dim} on rank {source.rank}, not along {layout.dim}"
                    )
                length = min(source.stop, end) - position
                yield Transfer(
                    source=source.rank,
                    source_index=source.parameter_index,
                    source_offset=source.offset,
                    target=target,
                    target_index=index,
                    target_offset=rows.offset + position - rows.start,
                    length=length,
                    row_bytes=source_layout.row_bytes,
                    dtype=source_layout.dtype,
                )
                position += length

    def _nearest(self, name: str, position: int, target: int) -> _NearestRows:
        """Return the rows from ``position`` on that the rank nearest to ``target`` holds."""
        best: _NearestRows | None = None
        best_distance = 0
        for interval, by_rank in self._intervals.get(name, ()):
            start, stop = interval
            if not start <= position < stop:
                continue
            ranks = self._ranks[name, interval]
            if self.layouts[target]:
                rank = _closest(ranks, target)
            else:
                # The nearest one would be the same for all of them, and send every byte.
                rank = ranks[target % len(ranks)]
            distance = abs(rank - target)
            # Of intervals at the same distance the first is taken, so that all ranks make the same plan.
            if best is None or distance < best_distance:
                location = by_rank[rank]
                offset = location.offset + position - start
                best = _NearestRows(rank, location.parameter_index, offset, stop)
                best_distance = distance
        if best is None:
            raise SliceError(f"no rank holds row {position} of {name}")
        return best


def _closest(ranks: Sequence[int], target: int) -> int:
    """Return the rank of the sorted ``ranks`` that is nearest to ``target``, the lower of two."""
    right = bisect_left(ranks, target)
    if right == 0:
        return ranks[0]
    below = ranks[right - 1]
    if right == len(ranks):
        return below
    above = ranks[right]
    if above - target < target - below:
        return above
    return below


def plan(
    sources: Sequence[Sequence[ShardLayout]],
    targets: Sequence[Sequence[ShardLayout]],
    rank: int,
    bucket_bytes: int,
    trained_only: bool = False,
) -> list[TransferStep]:
    """Plan the transfers of ``rank`` step by step; the steps have the same transfers on every rank.

    Args:
        sources: of each rank, the parameters that it holds.
        targets: of each rank, the parameters that are to be filled; the same ones in the same order on every rank that
            has any.
        rank: whose plan this is.
        bucket_bytes: most bytes that a rank sends and receives in a step, or one row; its own copies do not count.
        trained_only: leave out parameters that none of the sources trains.

    Raises:
        SliceError: no rank holds rows that a target needs.
    """
    owners = Owners(sources)
    steps = [TransferStep()]
    loads = [0] * len(sources)  # bytes of each rank in the last step
    for index in range(max(map(len, targets))):
        transfers: list[Transfer] = []
        for target, layouts in enumerate(targets):
            if layouts:
                transfers += owners.transfers(layouts[index], index, target)
        if trained_only and not _any_trained(transfers, sources):
            continue
        local: list[Transfer] = []
        remote: list[Transfer] = []
        for transfer in transfers:
            if transfer.source != transfer.target:
                remote += _cut(transfer, bucket_bytes // 2)
            elif transfer.target == rank:
                local.append(transfer)
        # Sorted by source and row, so that rows that several ranks need are sent in the same step.  Every rank counts
        # the loads of all ranks and so begins a new step at the same transfer: messages pair up without negotiation.
        for transfer in sorted(remote):
            source = transfer.source
            target = transfer.target
            size = transfer.padded_bytes
            load = max(loads[source], loads[target])
            if load and load + size > bucket_bytes:
                steps.append(TransferStep())
                loads = [0] * len(sources)
            loads[source] += size
            loads[target] += size
            if source == rank:
                steps[-1].sends.append(transfer)
            if target == rank:
                steps[-1].receives.append(transfer)
        steps[-1].copies += _merged(local)
        if targets[rank]:
            steps[-1].complete.append(index)
    return steps


def _any_trained(transfers: Sequence[Transfer], sources: Sequence[Sequence[ShardLayout]]) -> bool:
    """Return whether any of the parameters that the transfers read is trained."""
    for transfer in transfers:
        rank_layouts = sources[transfer.source]
        layout = rank_layouts[transfer.source_index]
        if layout.trained:
            return True
    return False


def _cut(transfer: Transfer, max_bytes: int) -> Iterator[Transfer]:
    """Split a transfer into transfers of at most ``max_bytes``, or of one row."""
    max_rows = max(max_bytes // transfer.row_bytes, 1)
    for first in range(0, transfer.length, max_rows):
        remaining = transfer.length - first
        yield transfer._replace(
            source_offset=transfer.source_offset + first,
            target_offset=transfer.target_offset + first,
            length=min(max_rows, remaining),
        )


def _merged(transfers: Iterable[Transfer]) -> list[Transfer]:
    """Join each transfer to the one before it where both its source and its target rows continue there."""
    joined: list[Transfer] = []
    for transfer in transfers:
        begin = (transfer.source_index, transfer.source_offset, transfer.target_offset)
        if joined:
            last = joined[-1]
            source_end = last.source_offset + last.length
            target_end = last.target_offset + last.length
            if (last.source_index, source_end, target_end) == begin:
                length = last.length + transfer.length
                joined[-1] = last._replace(length=length)
                continue
        joined.append(transfer)
    return joined
