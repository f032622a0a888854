"""Read where a run's numbers come from: recipe, overrides, commit, versions and machine of each start of a stage."""

from __future__ import annotations

from typing import TypedDict

from ovr_megatron.analysis.experiment import Experiment
from ovr_megatron.analysis.page import Cell, PageTable
from ovr_megatron.runtime.starts import RunStart, read_starts

_HEAD = ["Stage", "Recipe and overrides", "Commit", "Versions", "Machine"]


class RunOrigins(TypedDict):
    """The last start of each stage that recorded any, and its earlier ones."""

    last: PageTable
    earlier: PageTable


def read_origins(experiment: Experiment) -> RunOrigins:
    """Return the tables of the starts of all stages."""
    last: list[list[Cell]] = []
    earlier: list[list[Cell]] = []
    for stage in experiment.stages.values():
        starts = read_starts(stage.dir)
        if not starts:
            continue
        # Relative, so that the link works wherever the folder is copied to.
        path = stage.dir.relative_to(experiment.dir) / "config.yaml"
        title: Cell = [stage.title, {"href": path.as_posix(), "text": "configuration"}]
        last.append([title, *_cells(starts[-1])])
        for start in starts[:-1]:
            title = f"{stage.title}, {start['time']}"
            earlier.append([title, *_cells(start)])
    return {
        "last": {"head": _HEAD, "rows": last},
        "earlier": {"title": "Earlier starts", "head": _HEAD, "rows": earlier},
    }


def _cells(start: RunStart) -> list[Cell]:
    versions = [f"{name} {version}" for name, version in start["versions"].items()]
    recipe = [start["recipe"], *start["overrides"]]
    return [
        " ".join(recipe),
        start["commit"],
        ", ".join(versions),
        start["machine"],
    ]
