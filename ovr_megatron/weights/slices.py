"""Which part of which Hugging Face tensor a rank holds, and who sends what to whom so that others get theirs.

Trainer and engine cut the same tensors differently.  Both describe what they hold as runs of consecutive rows of
Hugging Face tensors; the intersections of the runs are what has to move.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ovr_megatron.model.shape import ModelShape
from ovr_megatron.weights.table import Row, cut_dim, from_hf, split

_ALIGNMENT = 16  # of a piece in a bucket, in bytes


class SliceError(ValueError):
    """A part of a tensor that is wanted and that no rank holds, or that is cut along another dimension."""


class Run(NamedTuple):
    """Rows ``start`` to ``start + length`` of a Hugging Face tensor, which stand from ``at`` on in a parameter."""

    tensor: str
    start: int
    at: int
    length: int


@dataclass(frozen=True)
class Held:
    """A parameter of this rank and the runs along ``dim`` that it is made of (None: of the flattened parameter)."""

    parameter: Tensor
    dim: int | None
    runs: tuple[Run, ...]
    trained: bool = True

    def described(self) -> Part:
        """What other ranks must know."""
        flat = self.parameter.numel() if self.dim is None else self.parameter.shape[self.dim]
        return Part(self.dim, self.parameter.nbytes // max(flat, 1), self.parameter.dtype, self.trained, self.runs)


class Part(NamedTuple):
    """A parameter of some rank: its dimension of cutting, bytes per row of it, format and runs."""

    dim: int | None
    row_bytes: int
    dtype: torch.dtype
    trained: bool
    runs: tuple[Run, ...]


class Piece(NamedTuple):
    """``length`` rows that rank ``source`` has from ``begin`` on, and rank ``target`` wants from ``at`` on.

    ``held`` and ``wanted`` number the parameters of the two.
    """

    source: int
    held: int
    begin: int
    target: int
    wanted: int
    at: int
    length: int
    row_bytes: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes as the source holds them."""
        return self.length * self.row_bytes

    @property
    def room(self) -> int:
        """Bytes in a bucket."""
        return -(-self.nbytes // _ALIGNMENT) * _ALIGNMENT


@dataclass
class Step:
    """What this rank sends, receives and copies for itself in one bucket, and which parameters are then whole."""

    sends: list[Piece] = field(default_factory=list)
    receives: list[Piece] = field(default_factory=list)
    copies: list[Piece] = field(default_factory=list)
    complete: list[int] = field(default_factory=list)


def runs_of(row: Row, tp: int, rank: int, shape: ModelShape) -> tuple[Run, ...]:
    """The runs that tensor-parallel ``rank`` of ``tp`` holds of a Megatron parameter, padding left out.

    Found by sending numbered rows through the table, so that there is one description of the layout.
    """
    dim = cut_dim(row)
    if dim is None:
        (name,), (size,) = row.hf, row.sizes
        return (Run(name, 0, 0, torch.Size(size).numel()),)
    lengths = [size[dim] for size in row.sizes]
    firsts = [sum(lengths[:i]) for i in range(len(lengths))]
    numbered = [
        torch.arange(first + 1, first + length + 1).unsqueeze(1 - dim)  # 0 is padding
        for first, length in zip(firsts, lengths, strict=True)
    ]
    local = split(row, from_hf(row, numbered, shape), tp, rank, shape).flatten()
    breaks = (local.diff() != 1).nonzero().flatten() + 1
    bounds = [0, *breaks.tolist(), len(local)]
    runs = []
    for begin, end in pairwise(bounds):
        number = int(local[begin]) - 1
        while begin < end and number >= 0:
            which = max(i for i, first in enumerate(firsts) if first <= number)
            length = min(end - begin, firsts[which] + lengths[which] - number)
            runs.append(Run(row.hf[which], number - firsts[which], begin, length))
            begin, number = begin + length, number + length
    return tuple(runs)


def rows_of(tensor: Tensor, dim: int | None, first: int, length: int) -> Tensor:
    """A view of the rows along ``dim`` of a parameter."""
    return tensor.view(-1)[first : first + length] if dim is None else tensor.narrow(dim, first, length)


class Owners:
    """Who holds which part of every Hugging Face tensor."""

    def __init__(self, held: Sequence[Sequence[Part]]):
        self.held = held
        found: dict[str, dict[tuple[int, int], dict[int, tuple[int, int]]]] = {}
        for rank, parts in enumerate(held):
            for number, part in enumerate(parts):
                for run in part.runs:
                    by_rank = found.setdefault(run.tensor, {}).setdefault((run.start, run.start + run.length), {})
                    by_rank.setdefault(rank, (number, run.at))
        self._intervals = {name: sorted(intervals.items()) for name, intervals in found.items()}
        self._ranks = {
            (name, interval): sorted(by_rank) for name, items in found.items() for interval, by_rank in items.items()
        }

    def pieces(self, wanted: Part, number: int, target: int) -> Iterator[Piece]:
        """The pieces that make parameter ``number`` of rank ``target`` whole, each from the nearest rank that has it.

        Raises:
            SliceError: nobody has it, or not cut along the same dimension.
        """
        for run in wanted.runs:
            position, end = run.start, run.start + run.length
            while position < end:
                source, held, begin, stop = self._nearest(run.tensor, position, target)
                part = self.held[source][held]
                if part.dim != wanted.dim:
                    raise SliceError(f"{run.tensor} is cut along {part.dim} on rank {source}, not along {wanted.dim}")
                length = min(stop, end) - position
                at = run.at + position - run.start
                yield Piece(source, held, begin, target, number, at, length, part.row_bytes, part.dtype)
                position += length

    def _nearest(self, name: str, position: int, target: int) -> tuple[int, int, int, int]:
        """Rank, number of its parameter, place there, and end of the interval that begins before ``position``."""
        best: tuple[int, int, int, int] | None = None
        for (start, stop), by_rank in self._intervals.get(name, ()):
            if start <= position < stop:
                rank = _closest(self._ranks[name, (start, stop)], target)
                if best is None or abs(rank - target) < abs(best[0] - target):
                    held, at = by_rank[rank]
                    best = rank, held, at + position - start, stop
        if best is None:
            raise SliceError(f"no rank holds row {position} of {name}")
        return best


def _closest(ranks: Sequence[int], target: int) -> int:
    place = bisect_left(ranks, target)
    return min(ranks[max(place - 1, 0) : place + 1], key=lambda rank: abs(rank - target))


def plan(
    held: Sequence[Sequence[Part]],
    wanted: Sequence[Sequence[Part]],
    rank: int,
    bucket_bytes: int,
    trained_only: bool = False,
) -> list[Step]:
    """What ``rank`` does, step by step; every rank finds the same steps.

    Args:
        held: of each rank, the parameters that it holds.
        wanted: of each rank, the parameters that are to be filled; the same ones in the same order on every rank.
        rank: whose plan this is.
        bucket_bytes: most bytes that a rank sends and receives in a step, or one row; its own copies do not count.
        trained_only: leave out parameters that none of the sources trains.

    Raises:
        SliceError: a wanted part that nobody holds.
    """
    owners = Owners(held)
    steps = [Step()]
    rooms = [0] * len(held)
    for number in range(len(wanted[0])):
        pieces = [p for target, parts in enumerate(wanted) for p in owners.pieces(parts[number], number, target)]
        if trained_only and not any(held[piece.source][piece.held].trained for piece in pieces):
            continue
        remote = [part for piece in pieces if piece.source != piece.target for part in _cut(piece, bucket_bytes // 2)]
        for piece in sorted(remote):  # what several want is sent in the same step
            load = rooms[piece.source], rooms[piece.target]
            if max(load) and max(load) + piece.room > bucket_bytes:
                steps.append(Step())
                rooms = [0] * len(held)
            rooms[piece.source] += piece.room
            rooms[piece.target] += piece.room
            if piece.source == rank:
                steps[-1].sends.append(piece)
            if piece.target == rank:
                steps[-1].receives.append(piece)
        steps[-1].copies += _merged(piece for piece in pieces if piece.source == piece.target == rank)
        steps[-1].complete.append(number)
    return steps


def _cut(piece: Piece, most: int) -> Iterator[Piece]:
    """The piece in parts of at most ``most`` bytes, or a row."""
    rows = max(most // piece.row_bytes, 1)
    for first in range(0, piece.length, rows):
        yield piece._replace(begin=piece.begin + first, at=piece.at + first, length=min(rows, piece.length - first))


def _merged(pieces: Iterable[Piece]) -> list[Piece]:
    """Pieces that go on where the last one ends, joined to it."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last and (last.held, last.begin + last.length, last.at + last.length) == (piece.held, piece.begin, piece.at):
            joined[-1] = last._replace(length=last.length + piece.length)
        else:
            joined.append(piece)
    return joined
