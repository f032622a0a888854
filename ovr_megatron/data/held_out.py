"""Hold rows out of the training data for validation; which ones depends on the index of a row in its source alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ovr_megatron.config import ConfigError, DataConfig, SourceConfig, ValidationConfig
from ovr_megatron.data.schema import ENDLESS, Row, RowSource
from ovr_megatron.data.sources import open_source

_KEY = 20250705  # of the stream of draws; another one would hold out other rows


class SelectedRows:
    """Some rows of a source, by their indices there."""

    def __init__(self, source: RowSource, indices: np.ndarray) -> None:
        """Select the rows ``indices`` (int64[n]) of ``source``."""
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        """Return n."""
        return len(self._indices)

    def __getitem__(self, index: int) -> Row:
        """Return row ``index`` of the selection; raises `RowError` if it cannot be used."""
        return self._source[int(self._indices[index])]


def choose_held_out(count: int, validation: ValidationConfig) -> np.ndarray:
    """Return bool[count]: the rows of a source of ``count`` rows that are for validation.

    Rows have draws that depend on their index alone: the rows with the smallest are chosen.  So the choice is the same
    for every seed, resume and number of ranks, and with ``share`` it stays when rows are appended.
    """
    generator = np.random.PCG64(np.random.SeedSequence(_KEY))
    draws = generator.random_raw(count)  # raw bits, which NumPy promises never to change (NEP 19)
    size = count
    if validation.share:
        size = int((draws < validation.share * 2.0**64).sum())
    if validation.rows:
        size = min(size, validation.rows)
    order = np.argsort(draws, kind="stable")
    is_held_out = np.zeros(count, bool)
    is_held_out[order[:size]] = True
    return is_held_out


def hold_out(path: str, count: int, validation: ValidationConfig) -> np.ndarray:
    """Return bool[count]: the rows that are held out of the training source at ``path``.

    Raises:
        ConfigError: the source has no end, or no row would be left for training or for validation.
    """
    if count >= ENDLESS:
        raise ConfigError(
            f"validation: no rows can be held out of {path}, which has no end; give validation.sources, for a puzzle "
            "with split=heldout"
        )
    is_held_out = choose_held_out(count, validation)
    held_out = int(is_held_out.sum())
    if 0 < held_out < count:
        return is_held_out
    raise ConfigError(
        f"validation.share={validation.share} and validation.rows={validation.rows} hold {held_out} of the {count} "
        f"rows of {path} out; choose them so that there are rows for training and for validation"
    )


def open_training_source(source: SourceConfig, validation: ValidationConfig | None) -> RowSource:
    """Open a training source without the rows that are held out of it.

    Raises:
        ConfigError: as `hold_out`.
        RowError: the source cannot be read.
    """
    rows = open_source(source)
    if validation is None or not validation.holds_out:
        return rows
    is_held_out = hold_out(source.path, len(rows), validation)
    return SelectedRows(rows, np.flatnonzero(~is_held_out))


def open_validation_sources(data: DataConfig, validation: ValidationConfig) -> list[tuple[SourceConfig, RowSource]]:
    """Open the validation rows: ``validation.sources``, or the rows that are held out of ``data.sources``.

    Raises:
        ConfigError: as `hold_out`, or a source of ``validation.sources`` has no end and ``validation.rows`` is 0.
        RowError: a source cannot be read.
    """
    opened: list[tuple[SourceConfig, RowSource]] = []
    for source in validation.sources or data.sources:
        rows = open_source(source)
        if validation.holds_out:
            is_held_out = hold_out(source.path, len(rows), validation)
            indices = np.flatnonzero(is_held_out)
        elif len(rows) >= ENDLESS:
            if not validation.rows:
                raise ConfigError(f"validation.sources: {source.path} has no end; give validation.rows")
            indices = np.arange(validation.rows)
        else:
            indices = np.flatnonzero(choose_held_out(len(rows), validation))
        opened.append((replace(source, weight=1.0), SelectedRows(rows, indices)))
    return opened
