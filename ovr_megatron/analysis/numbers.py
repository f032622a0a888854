"""Write the numbers behind the figures as CSV: every stage's metrics by step, scores, rates of behaviours."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ovr_megatron.analysis.experiment import Experiment
from ovr_megatron.analysis.tail import TableRow, length_rows, read_timeline, select_iteration, timeline_rows
from ovr_megatron.evaluation.scoring import SourceScores

# A spreadsheet takes a cell that begins so for a formula, and computes it.
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


def _tables(experiment: Experiment) -> dict[str, Sequence[TableRow]]:
    tables: dict[str, Sequence[TableRow]] = {}
    for name, stage in experiment.stages.items():
        tables[name] = stage.metrics
    if rl := experiment.stages.get("rl"):
        lines = read_timeline(rl)
        if line := select_iteration(lines, experiment.iteration):
            tables["rl_timeline"] = list(timeline_rows(line))
        tables["rl_lengths"] = list(length_rows(lines))
    tables["scores"] = list(_score_rows(experiment))
    tables["behaviours"] = list(_behaviour_rows(experiment))
    return tables


def _write_table(path: Path, rows: Sequence[TableRow]) -> None:
    # Rows may have different keys, for example metrics that were logged in some steps only: a column for each of them.
    columns: dict[str, None] = {}
    for row in rows:
        columns |= dict.fromkeys(row)
    # No translation: csv writes the ends of lines itself, and those within a cell as they are.
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(columns))
        table.writerow({key: _cell(key) for key in columns})
        for row in rows:
            table.writerow({key: _cell(value) for key, value in row.items()})


def _score_rows(experiment: Experiment) -> Iterator[TableRow]:
    """Yield a row for each score: of a whole problem set with an empty ``source``, then of each of its sources."""
    for model, evaluations in experiment.scores.items():
        for set_name, evaluation in evaluations.items():
            names = {"model": model, "set": set_name}
            yield from _rows_of_source(evaluation, {**names, "source": ""})
            for source, scores in evaluation["sources"].items():
                yield from _rows_of_source(scores, {**names, "source": source})


def _rows_of_source(scores: SourceScores, names: Mapping[str, str]) -> Iterator[TableRow]:
    if greedy := scores.get("greedy"):
        yield {**names, "response": "greedy", **_flatten(greedy)}
    if sampled := scores.get("sampled"):
        yield {**names, "response": "sampled", **_flatten(sampled)}


def _behaviour_rows(experiment: Experiment) -> Iterator[TableRow]:
    for model, checkpoint in experiment.checkpoints.items():
        for name, rates in checkpoint["behaviours"].items():
            row: dict[str, object] = {"model": model, "behaviour": name}
            if emergence := rates["emergence"]:
                row |= _flatten(emergence)
            row["per_trace"] = rates["per_trace"]
            if split := experiment.behaviour_accuracy(model, name):
                for part, accuracy in (("with", split["present"]), ("without", split["absent"])):
                    for key, value in (accuracy or {}).items():
                        row[f"{part}_{key}"] = value
            if transfer := checkpoint["transfer"].get(name):
                for key, value in transfer.items():
                    row[f"transfer_{key}"] = value
            yield row


def _cell(value: object) -> object:
    """Return a value that no spreadsheet takes for a formula: names of sources and sets come from elsewhere."""
    if isinstance(value, str) and value.startswith(_FORMULA_STARTS):
        return f"'{value}"
    return value


def _flatten(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return a nested dictionary as one row, with the keys of each level joined by ``_``."""
    row: dict[str, object] = {}
    for key, value in tree.items():
        column = f"{prefix}{key}"
        if isinstance(value, dict):
            row |= _flatten(value, f"{column}_")
        else:
            row[column] = value
    return row
