"""Write the numbers behind the figures as CSV: every stage's metrics by step, scores, rates of behaviours."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ovr_megatron.analysis.experiment import Experiment

TableRow = dict[str, Any]
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def write_numbers(experiment: Experiment) -> list[Path]:
    """Write ``figures/NAME.csv`` for each table behind the figures that has rows, and return the paths."""
    folder = experiment.dir / "figures"
    folder.mkdir(exist_ok=True)
    paths = []
    for name, rows in _tables(experiment).items():
        if rows:
            path = folder / f"{name}.csv"
            _write_table(path, rows)
            paths.append(path)
    return paths


def _tables(experiment: Experiment) -> dict[str, list[TableRow]]:
    tables: dict[str, list[TableRow]] = {}
    for name, stage in experiment.stages.items():
        tables[name] = stage.metrics
    tables["scores"] = list(_score_rows(experiment))
    tables["behaviours"] = list(_behaviour_rows(experiment))
    return tables


def _write_table(path: Path, rows: list[TableRow]) -> None:
    # Rows may have different keys, for example metrics that were logged in some steps only: a column for each of them.
    columns: dict[str, None] = {}
    for row in rows:
        columns |= dict.fromkeys(row)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(columns))
        table.writerow({key: _cell(key) for key in columns})
        for row in rows:
            table.writerow({key: _cell(value) for key, value in row.items()})


def _score_rows(experiment: Experiment) -> Iterator[TableRow]:
    """Yield a row for each score: of a whole problem set with an empty ``source``, then of each of its sources."""
    for model, evaluations in experiment.scores.items():
        for set_name, evaluation in evaluations.items():
            for source, scores in [("", evaluation), *evaluation["sources"].items()]:
                for kind in ("greedy", "sampled"):
                    if scores.get(kind):
                        names = {"model": model, "set": set_name, "source": source, "response": kind}
                        yield names | _flatten(scores[kind])


def _behaviour_rows(experiment: Experiment) -> Iterator[TableRow]:
    for model, checkpoint in experiment.behaviours.get("checkpoints", {}).items():
        for name, counts in checkpoint["behaviours"].items():
            row = {"model": model, "behaviour": name} | _flatten(counts["emergence"] or {})
            row["per_trace"] = counts["per_trace"]
            transfer = checkpoint["transfer"].get(name) or {}
            yield row | {f"transfer_{key}": value for key, value in transfer.items()}


def _cell(value: Any) -> Any:
    """Return a value that no spreadsheet takes for a formula: names of sources and sets come from elsewhere."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA_STARTS) else value


def _flatten(tree: TableRow, prefix: str = "") -> TableRow:
    """Return a nested dictionary as one row, with the keys of each level joined by ``_``."""
    row: TableRow = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            row |= _flatten(value, f"{prefix}{key}_")
        else:
            row[f"{prefix}{key}"] = value
    return row
