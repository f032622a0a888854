"""What is asked and how: problem sets, the benchmarks' by name, and the settings of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset, Subset

from ovr_megatron.config import ConfigError, SourceConfig
from ovr_megatron.data.schema import ENDLESS, Row, RowSource
from ovr_megatron.data.sources import open_source
from ovr_megatron.evaluation.benchmarks import BENCHMARKS, OURS, Benchmark
from ovr_megatron.evaluation.scoring import reference_of


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How problems are asked and graded.

    Attributes:
        samples: Sampled responses for pass@k, beside the greedy one; 0 for none, None for as many as the set asks for.
        temperature: Of the samples.
        max_tokens: Longest response.
        metric: ``boxed``, ``exact``, or ``auto`` (`ovr_megatron.evaluation.scoring.reference_of`).
        seed: Of the samples.
    """

    samples: int | None = 0
    temperature: float = 1.0
    max_tokens: int = 1024
    metric: str = "auto"
    seed: int = 1


@dataclass(frozen=True)
class ProblemSet:
    """The first ``count`` rows of a source; ``name`` becomes the name of the files.

    ``known`` is the benchmark of this name, whose rules and scores then hold, wherever the rows are from.
    """

    name: str
    path: str
    rows: RowSource | Sequence[Row]
    count: int
    known: Benchmark | None = None

    def settings(self, wanted: Settings) -> Settings:
        """The same with a number of samples."""
        own = self.known.samples if self.known else 0
        return wanted if wanted.samples is not None else replace(wanted, samples=own)

    def metric(self, row: Row, wanted: str) -> tuple[str, str]:
        """How a row is graded, and against what (`ovr_megatron.evaluation.scoring.reference_of`)."""
        metric, reference = reference_of(row, wanted)
        rules = self.known.rules if self.known and metric == "boxed" else {}
        return rules.get(row.source) or rules.get("") or metric, reference


def open_problems(source: SourceConfig, limit: int = 0) -> ProblemSet:
    """Open ``source``, which has a name, as a problem set; ``limit`` takes its first rows only, 0 all of them.

    A path that is the name of a benchmark stands for the place where it is published.

    Raises:
        ConfigError: the source is endless and there is no limit, or another harness runs the benchmark.
        RowError: the source cannot be opened.
    """
    assert source.name
    known = BENCHMARKS.get(source.name)
    paths: tuple[str, ...] = (source.path,)
    if source.path in BENCHMARKS and not Path(source.path).exists():
        known = BENCHMARKS[source.path]
        if known.harness != OURS:
            raise ConfigError(
                f"{known.title} is run by {known.harness} (its name there: {known.command}); see the docs"
            )
        paths = known.paths
    # A name would stand for the rows' own sources.
    opened = [open_source(replace(source, path=path, name=None)) for path in paths]
    rows: Any = opened[0] if len(opened) == 1 else ConcatDataset(opened)
    if len(rows) >= ENDLESS and not limit:
        raise ConfigError(f"{source.path} never ends; give a limit, or for a puzzle split=heldout")
    if known and known.only:
        rows = Subset(rows, [at for at in range(len(rows)) if rows[at].source == known.only])
        if not len(rows):
            raise ConfigError(f"{source.path}: no row is of the source {known.only!r}, which {known.title} is about")
    return ProblemSet(source.name, source.path, rows, min(limit or len(rows), len(rows)), known)
