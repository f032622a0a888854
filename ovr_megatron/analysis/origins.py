"""Read where a run's numbers come from: recipe, overrides, commit, versions and machine of each start of a stage."""

from __future__ import annotations

from typing import Any

from ovr_megatron.analysis.experiment import Experiment
from ovr_megatron.analysis.page import Cell
from ovr_megatron.runtime.starts import RunStart, read_starts

_HEAD = ["Stage", "Recipe and overrides", "Commit", "Versions", "Machine"]


def read_origins(experiment: Experiment) -> dict[str, Any]:
    """Return two tables, ``last``: the last start of each stage that recorded any, and ``earlier``."""
    last: list[list[Cell]] = []
    earlier: list[list[Cell]] = []
    for stage in experiment.stages.values():
        starts = read_starts(stage.dir)
        if not starts:
            continue
        path = stage.dir.relative_to(experiment.dir) / "config.yaml"
        title: Cell = [stage.title, {"href": path.as_posix(), "text": "configuration"}]
        last.append([title, *_cells(starts[-1])])
        for start in starts[:-1]:
            earlier.append([f"{stage.title}, {start['time']}", *_cells(start)])
    return {
        "last": {"head": _HEAD, "rows": last},
        "earlier": {"title": "Earlier starts", "head": _HEAD, "rows": earlier},
    }


def _cells(start: RunStart) -> list[Cell]:
    versions = ", ".join(f"{name} {version}" for name, version in start["versions"].items())
    recipe = " ".join([start["recipe"], *start["overrides"]])
    return [recipe, start["commit"], versions, start["machine"]]
