"""Measure every row of finite sources once, so that their epochs can be planned: lengths first, pixels when trained.

The ranks measure a part each and exchange the lengths; every rank then has the same set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ovr_megatron.config import ConfigError, DataConfig, SourceConfig
from ovr_megatron.data.fingerprints import fingerprint
from ovr_megatron.data.packing import count_replies
from ovr_megatron.data.processing import Processor, TooLongError
from ovr_megatron.data.samples import Sample
from ovr_megatron.data.schema import ENDLESS, Row, RowError, RowSource
from ovr_megatron.data.skipped import SkippedRows, lengths_or_errors
from ovr_megatron.data.work import RowWork, attention_work
from ovr_megatron.runtime import watchdog
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.exchange import gather_objects
from ovr_megatron.runtime.progress import Progress

_CHUNK = 64  # rows that are tokenised together


@dataclass(frozen=True)
class _Measures:
    """Rows as measured.

    Attributes:
        values: int32[n, 3], tokens of each sample (0 where it is left out), assistant messages, and those learned.
        work: float64[n], the work of each row.
        errors: The error of a row that has one, by its position in all sources.
    """

    values: np.ndarray
    work: np.ndarray
    errors: dict[int, RowError]

    @staticmethod
    def empty(count: int) -> _Measures:
        """Return measures of ``count`` rows that are all left out."""
        return _Measures(np.zeros((count, 3), np.int32), np.zeros(count), {})


class RowSet:
    """The rows of finite sources that fit into a pack, by index.

    A row over ``data.max_prompt_tokens``, ``data.pack_tokens`` or the model's positions is left out and counted; so is
    one whose fingerprint is excluded, and, where there is a list for it, one that cannot be used.

    Attributes:
        title: The setting that names the rows, for errors.
        lengths: int32[N], tokens of each sample.
        prompts: int32[N], zeros: rows with too long a prompt are left out already.
        sources: int32[N], index of the source of each.
        weights: How often an epoch has each row of a source.
        dropped: Rows left out.
        work: float64[N], the work of each row, by which packs are shared among the replicas.
        digest: A fingerprint of the lengths, on which the order of an epoch depends.
    """

    def __init__(
        self,
        sources: Sequence[tuple[SourceConfig, RowSource]],
        processor: Processor,
        world: World,
        exclude: frozenset[str] = frozenset(),
        skipped: SkippedRows | None = None,
        title: str = "data.sources",
        work: RowWork = attention_work,
    ) -> None:
        """Measure all rows.  A collective.

        Args:
            sources: The settings and rows of each source.
            processor: Of the model.
            world: The ranks that share the work.
            exclude: Fingerprints of rows that are left out.
            skipped: Lists rows that cannot be used; None stops at the first.
            title: The setting that names the rows, for errors.
            work: The work of a row.

        Raises:
            ConfigError: a source has no end, or no row is left.
            RowError: on every rank, a row cannot be used and there is no list for it.
        """
        for source, rows in sources:
            check_finite(title, source.path, rows)
        self.title = title
        self.weights = [source.weight for source, _ in sources]
        self._rows = [rows for _, rows in sources]
        counts = [len(rows) for rows in self._rows]
        self._starts = np.cumsum([0, *counts])
        self._processor = processor
        self._exclude = exclude
        self._row_work = work
        self._skips = skipped is not None
        measures = self._measure(world)
        _report(measures.errors, skipped)
        lengths = np.ascontiguousarray(measures.values[:, 0])
        self._indices = np.flatnonzero(lengths)
        self.dropped = len(lengths) - len(self._indices)
        if not len(self._indices):
            cause = "all are excluded"
            if measures.errors:
                first = min(measures.errors)
                cause = f"the first {measures.errors[first].problem}"
            remedy = "correct them, or the limits of data"
            raise ConfigError(f"{title}: none of the {len(lengths)} rows can be used: {cause}; {remedy}")
        self.lengths = lengths[self._indices]
        self.work = measures.work[self._indices]
        self.prompts = np.zeros(len(self), np.int32)
        ends = self._starts[1:]
        self.sources = np.searchsorted(ends, self._indices, side="right").astype(np.int32)
        self._replies = measures.values[self._indices, 1:]
        digest = hashlib.sha256(self._starts.tobytes())
        digest.update(lengths.tobytes())
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        """Return N."""
        return len(self._indices)

    def where(self, index: int) -> str:
        """Return ``file:line`` of row ``index``."""
        position = self._indices[index]
        return self._row(position).where

    def samples(self, indices: Sequence[int] | np.ndarray) -> list[Sample]:
        """Return the samples of rows, with their pixels.

        Raises:
            RowError: an image cannot be used.
        """
        positions = self._indices[indices]
        rows = [self._row(position) for position in positions]
        return self._processor.encode(rows, generation=False)

    def replies(self, indices: np.ndarray) -> tuple[int, int]:
        """Count the assistant messages of rows, and those of them that are learned."""
        counts = self._replies[indices]
        total, learned = counts.sum(axis=0).tolist()
        return total, learned

    def _row(self, position: int) -> Row:
        """Return a row by its position in all sources."""
        ends = self._starts[1:]
        source = int(np.searchsorted(ends, position, side="right"))
        index = position - self._starts[source]
        return self._rows[source][int(index)]

    def _measure(self, world: World) -> _Measures:
        """Measure this rank's part of the rows and return the measures of all.  A collective."""
        count = int(self._starts[-1])
        positions = range(world.rank, count, world.size)
        local = _Measures.empty(len(positions))
        with Progress(len(positions), self.title, "row", world.is_main, inner=True) as progress:
            for start in range(0, len(positions), _CHUNK):
                watchdog.touch()
                end = start + _CHUNK
                chunk = positions[start:end]
                self._measure_chunk(chunk, start, local)
                progress.update(len(chunk))
        if world.size == 1:
            return local
        measures = _Measures.empty(count)
        for rank, part in enumerate(gather_objects(local)):
            measures.values[rank :: world.size] = part.values
            measures.work[rank :: world.size] = part.work
            measures.errors.update(part.errors)
        return measures

    def _measure_chunk(self, positions: Sequence[int], start: int, measures: _Measures) -> None:
        """Write the measures of the rows at ``positions``, of which the first is row ``start`` of ``measures``."""
        config = self._processor.config
        rows: list[tuple[int, Row]] = []  # number in the measures, and row
        for number, position in enumerate(positions, start=start):
            try:
                row = self._row(position)
                if not self._exclude or fingerprint(row, config) not in self._exclude:
                    rows.append((number, row))
            except RowError as unreadable:
                measures.errors[position] = unreadable
        # An error is kept in any case: raised here, on one rank, the others would wait in the exchange.  Images are
        # decoded only where rows are skipped.
        chunk_rows = [row for _, row in rows]
        skipped = SkippedRows(None)
        lengths = lengths_or_errors(self._processor, chunk_rows, generation=False, skipped=skipped, decode=self._skips)
        for (number, row), length in zip(rows, lengths, strict=True):
            fitting_length = _check_pack(row, length, config)
            if isinstance(fitting_length, RowError):
                position = positions[number - start]
                measures.errors[position] = fitting_length
                continue
            replies, learned = count_replies([row], config.learn)
            measures.values[number] = (fitting_length, replies, learned)
            measures.work[number] = self._row_work(row, fitting_length)


def check_finite(title: str, path: str, rows: RowSource) -> None:
    """Raise `ConfigError` for a source without an end, of which there are no epochs; ``title`` names the setting."""
    if len(rows) >= ENDLESS:
        raise ConfigError(
            f"{title}: {path} has no end, and steps=0 trains for epochs; give steps, or for a puzzle "
            "split=heldout&count=N"
        )


def _report(errors: dict[int, RowError], skipped: SkippedRows | None) -> None:
    """List the rows that are left out, in their order; without a list raise the first error but that of a length."""
    for position in sorted(errors):
        error = errors[position]
        if skipped is not None:
            skipped.add(error)
        elif not isinstance(error, TooLongError):
            raise error


def _check_pack(row: Row, length: int | RowError, config: DataConfig) -> int | RowError:
    """Return the length of a row, or the error that leaves it out: its own, or that it is longer than a pack."""
    if isinstance(length, RowError) or length <= config.pack_tokens:
        return length
    problem = f"has {length} tokens, more than data.pack_tokens={config.pack_tokens}"
    return TooLongError(row.where, "messages", problem, "raise data.pack_tokens, or leave the row out")
