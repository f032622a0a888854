"""Open problem sets, a benchmark by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset, Subset

from ovr_megatron.config import ConfigError, EvaluationSettings, SourceConfig
from ovr_megatron.data.schema import ENDLESS, Row, RowSource
from ovr_megatron.data.sources import open_source
from ovr_megatron.evaluation.benchmarks import BENCHMARKS, OURS, Benchmark
from ovr_megatron.evaluation.scoring import METRICS, OfficialScore, reference_of
from ovr_megatron.rewards import rules
from ovr_megatron.rewards.references import check_reference
from ovr_megatron.rewards.verdict import RuleError


@dataclass(frozen=True)
class ProblemSet:
    """The first ``count`` rows of a source.

    Attributes:
        name: Name of the set and of its files.
        path: Path of the source.
        rows: Its rows.
        count: Number of problems.
        benchmark: The benchmark of this name; its rules and scores hold wherever the rows are from.
    """

    name: str
    path: str
    rows: RowSource | Sequence[Row]
    count: int
    benchmark: Benchmark | None = None

    @property
    def official(self) -> Mapping[str, OfficialScore] | None:
        """Return the benchmark's own scores by title."""
        return self.benchmark.official if self.benchmark else None

    def resolve_settings(self, settings: EvaluationSettings) -> EvaluationSettings:
        """Return ``settings`` with the set's own rule as its metric, and a benchmark's samples where they have none."""
        settings = replace(settings, metric=settings.rules.get(self.name, settings.metric))
        if settings.samples is not None:
            return settings
        return replace(settings, samples=self.benchmark.samples if self.benchmark else 0)

    def metric_of(self, row: Row, metric: str) -> tuple[str, str]:
        """Return the metric of a row and its reference (`ovr_megatron.evaluation.scoring.reference_of`).

        A box is graded by the benchmark's rule for the row's source, else by its rule for all sources, if it has one.
        """
        metric, reference = reference_of(row, metric)
        if self.benchmark and metric == "boxed":
            rules = self.benchmark.rules  # "" stands for all sources that have no rule of their own
            metric = rules.get(row.source) or rules.get("") or metric
        return metric, reference

    def check_references(self, metric: str) -> None:
        """Check that every problem has something to compare a response with, before any is generated.

        Raises:
            RowError: a row has no reference, or none that the rule reads, or cannot be used.
            RuleError: there is no such metric and no such rule, or it asks a judge.
        """
        is_rule = metric not in METRICS
        if is_rule:
            check_rule(metric)
        for index in range(self.count):
            row = self.rows[index]
            _, reference = self.metric_of(row, metric)
            if is_rule:
                check_reference(replace(row, answer=reference), {row.source: metric})


def check_rule(name: str) -> None:
    """Refuse a rule by which an evaluation cannot grade.

    Raises:
        RuleError: there is no such rule, it would not work, or it asks a judge.
    """
    if rules.is_judge(name):
        raise RuleError(f"{name}: an evaluation grades by itself; have its responses judged by ovr judge afterwards")
    rules.check(name)


def open_problems(source: SourceConfig, limit: int = 0) -> ProblemSet:
    """Open ``source``, which has a name, as a problem set of its first ``limit`` rows, or of all for 0.

    A path that is the name of a benchmark, and no file, stands for where the benchmark is published.

    Raises:
        ConfigError: the source is endless and there is no limit, or another harness runs the benchmark.
        RowError: the source cannot be opened.
    """
    assert source.name
    benchmark = BENCHMARKS.get(source.name)
    paths: tuple[str, ...] = (source.path,)
    if source.path in BENCHMARKS and not Path(source.path).exists():
        benchmark = BENCHMARKS[source.path]
        if benchmark.harness != OURS:
            raise ConfigError(
                f"{benchmark.title} is run by {benchmark.harness} (its name there: {benchmark.command}); see the docs"
            )
        paths = benchmark.paths
    # Without the name: it would replace the sources of the rows, by which a benchmark chooses rules and rows.
    parts = [open_source(replace(source, path=path, name=None)) for path in paths]
    rows: Any = parts[0] if len(parts) == 1 else ConcatDataset(parts)
    if len(rows) >= ENDLESS and not limit:
        raise ConfigError(f"{source.path} never ends; give a limit, or for a puzzle split=heldout")
    # A benchmark may be a part of the published set; only the rows themselves say which part they belong to.
    if benchmark and benchmark.only_source:
        rows = Subset(rows, [index for index in range(len(rows)) if rows[index].source == benchmark.only_source])
        if not len(rows):
            raise ConfigError(
                f"{source.path}: no row is of the source {benchmark.only_source!r}, which {benchmark.title} is about"
            )
    return ProblemSet(source.name, source.path, rows, min(limit or len(rows), len(rows)), benchmark)
