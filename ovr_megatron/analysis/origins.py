"""Render where a run's numbers come from: recipe, overrides, commit, versions and machine of each start of a stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ovr_megatron.analysis.experiment import Experiment
from ovr_megatron.analysis.page import Html, details, join, section, table, tag
from ovr_megatron.runtime.starts import read_starts


def render_origins(experiment: Experiment) -> Iterator[Html]:
    """Yield the section, if any start was recorded: the last start of each stage, earlier ones folded below."""
    rows: list[list[object]] = []
    earlier: list[list[object]] = []
    for stage in experiment.stages.values():
        starts = read_starts(stage.dir)
        if not starts:
            continue
        path = stage.dir.relative_to(experiment.dir) / "config.yaml"
        title = join([stage.title, tag("a", "configuration", href=path.as_posix())])
        rows.append([title, *_cells(starts[-1])])
        for start in starts[:-1]:
            earlier.append([f"{stage.title}, {start['time']}", *_cells(start)])
    if rows:
        head = ["Stage", "Recipe and overrides", "Commit", "Versions", "Machine"]
        folded = details("Earlier starts", table(head, earlier)) if earlier else None
        yield section("Where the numbers come from", table(head, rows), folded)


def _cells(start: dict[str, Any]) -> list[object]:
    versions = ", ".join(f"{name} {version}" for name, version in start["versions"].items())
    recipe = " ".join([start["recipe"], *start["overrides"]])
    return [recipe, start["commit"], versions, start["machine"]]
