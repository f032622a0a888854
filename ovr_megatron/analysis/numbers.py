"""The numbers behind the figures as CSV: every stage's metrics by step, scores, rates of behaviours."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from ovr_megatron.analysis.experiment import Experiment

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def write_numbers(experiment: Experiment) -> list[Path]:
    """Write ``figures/NAME.csv`` for each of `numbers`; returns the paths."""
    folder = experiment.dir / "figures"
    folder.mkdir(exist_ok=True)
    paths = []
    for name, rows in numbers(experiment).items():
        paths.append(folder / f"{name}.csv")
        with paths[-1].open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            table.writerow({key: _cell(key) for key in table.fieldnames})
            table.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return paths


def numbers(experiment: Experiment) -> dict[str, list[dict[str, Any]]]:
    """The rows behind the figures: every stage's metrics by step, scores, and rates of behaviours."""
    tables: dict[str, list[dict[str, Any]]] = {name: stage.metrics for name, stage in experiment.stages.items()}
    tables["scores"] = [
        {"model": model, "set": name, "source": source, "response": kind, **_flat(found[kind])}
        for model, sets in experiment.scores.items()
        for name, score in sets.items()
        for source, found in [("", score), *score["sources"].items()]
        for kind in ("greedy", "sampled")
        if found.get(kind)
    ]
    tables["behaviours"] = [
        {"model": model, "behaviour": name, **_flat(told["emergence"] or {}), "per_trace": told["per_trace"]}
        | {f"transfer_{key}": value for key, value in (found["transfer"].get(name) or {}).items()}
        for model, found in experiment.behaviours.get("checkpoints", {}).items()
        for name, told in found["behaviours"].items()
    ]
    return {name: rows for name, rows in tables.items() if rows}


def _cell(value: Any) -> Any:
    """Return a value that no spreadsheet takes for a formula: names of sources and sets are not ours."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _flat(found: dict[str, Any], before: str = "") -> dict[str, Any]:
    """A nested dictionary as one row."""
    row: dict[str, Any] = {}
    for key, value in found.items():
        row |= _flat(value, f"{before}{key}_") if isinstance(value, dict) else {f"{before}{key}": value}
    return row
