"""Count the epochs of each source in a run: a stream has no end, and a short source is repeated again and again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ovr_megatron.config import DataConfig, ValidationConfig
from ovr_megatron.data.held_out import open_training_source
from ovr_megatron.data.row_set import check_finite
from ovr_megatron.data.schema import ENDLESS
from ovr_megatron.data.sources import open_source

MANY = 20.0  # epochs of a source above which a person should know


@dataclass(frozen=True)
class SourceUse:
    """A source of finitely many ``rows``, each of which a run sees ``epochs`` times."""

    name: str
    rows: int
    epochs: float


def epoch_data(data: DataConfig, validation: ValidationConfig) -> DataConfig:
    """Return ``data`` with, as the weight of each source, the number of its samples in an epoch.

    A stream with these weights draws as often from each source as epochs do.

    Raises:
        ConfigError: a source has no end, or no row of it is left for training.
        RowError: a source cannot be read.
    """
    sources = []
    for source in data.sources:
        rows = open_training_source(source, validation)
        check_finite("data.sources", source.path, rows)
        sources.append(replace(source, weight=source.weight * len(rows)))
    return replace(data, sources=sources)


def source_uses(data: DataConfig, samples: float) -> list[SourceUse]:
    """Return the finite sources of ``data`` with the epochs that ``samples`` draws from all sources make of them.

    Raises:
        RowError: a source cannot be read.
    """
    weights = sum(source.weight for source in data.sources)
    uses = []
    for source in data.sources:
        if source.streaming:  # nobody knows how many rows it has
            continue
        rows = len(open_source(source))
        if rows < ENDLESS:
            source_samples = samples * source.weight / weights
            epochs = source_samples / max(rows, 1)
            name = source.name or source.path
            uses.append(SourceUse(name, rows, epochs))
    return uses


def show_uses(uses: Sequence[SourceUse]) -> list[str]:
    """Return a line for each source, and a warning where its rows are repeated more than `MANY` times."""
    lines = []
    for use in uses:
        lines.append(f"{use.name}: {use.rows:,} rows, {use.epochs:,.1f} epochs")
    for use in uses:
        if use.epochs > MANY:
            lines.append(
                f"warning: every row of {use.name} is trained on {use.epochs:,.0f} times; add rows, lower its weight, "
                "or train for fewer steps"
            )
    return lines
