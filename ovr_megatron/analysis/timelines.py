"""Draw timelines of iterations, a row for each rank or engine: measured ones of a run, and simulated ones of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ovr_megatron.analysis.themes import LIGHT, WIDE, Theme, legend_columns
from ovr_megatron.plan.plan_json import PlannedMode, PlannedSimulation

MAX_ROWS = 64  # of one timeline; of more ranks or engines so many are drawn, evenly chosen
# Titles of what a rank does, by the names in a run's timeline, in the order of an iteration.
ACTIVITIES = {
    "draw": "Draw prompts",
    "engine": "Engine busy",
    "wait": "Wait for others",
    "grade": "Grade",
    "sleep": "Engine to sleep",
    "value": "Score, value",
    "update": "Update",
    "sync": "Send weights",
}
_SIMULATED = {"engine": "Engine busy", "wait": "Wait for others", "grade": "Grade", "update": "Train"}
DPI = 180

Bar = tuple[float, float, float, float]
"""Begin and width in seconds, bottom and height in rows."""


def colours(theme: Theme) -> dict[str, str]:
    """Return the colour of each of `ACTIVITIES`."""
    _, blue, orange, purple = theme.models
    return {
        "draw": theme.ink,
        "engine": blue,
        "wait": theme.grid,
        "grade": purple,
        "sleep": theme.muted,
        "value": "#c9a227",
        "update": orange,
        "sync": theme.models[0],
    }


def drawn_rows(count: int) -> list[int]:
    """Return the indices of the rows that are drawn of ``count``."""
    if count <= MAX_ROWS:
        return list(range(count))
    return [index * (count - 1) // (MAX_ROWS - 1) for index in range(MAX_ROWS)]


def draw_bars(axes: Axes, bars: Mapping[str, Sequence[Bar]], theme: Theme) -> None:
    """Draw the bars of each activity, the first row at the top."""
    palette = colours(theme)
    for activity, boxes in bars.items():
        if boxes:
            begins, widths, bottoms, heights = zip(*boxes, strict=True)
            axes.barh(
                bottoms, widths, heights, begins, align="edge", color=palette[activity], linewidth=0, gid=activity
            )
    axes.invert_yaxis()
    axes.set_yticks([])
    axes.grid(False)
    axes.margins(0)


def add_legend(figure: Figure, titles: Mapping[str, str], theme: Theme, width: float) -> None:
    """Add a legend of the activities below the panels."""
    palette = colours(theme)
    patches = [Patch(color=palette[activity], label=title) for activity, title in titles.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=legend_columns(width), fontsize=8)


def write_simulation(simulation: PlannedSimulation, path: Path) -> None:
    """Draw a plan's simulated iterations into ``path``, whose suffix is a format of Matplotlib."""
    with matplotlib.rc_context({**LIGHT.settings, "svg.fonttype": "none", "svg.hashsalt": "ovr"}):
        figure = draw_simulation(simulation, LIGHT)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without a date the same numbers give the same bytes.
        undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
        figure.savefig(path, dpi=DPI, metadata=undated.get(path.suffix))


def draw_simulation(simulation: PlannedSimulation, theme: Theme, width: float = WIDE) -> Figure:
    """Draw the last rounds of each way of generating, one below the other with the same scale of seconds."""
    modes = simulation["modes"]
    figure = Figure(figsize=(width, 0.95 * len(modes) + 0.8), layout="constrained")
    panels = figure.subplots(len(modes), 1, sharex=True, squeeze=False)[:, 0]
    for axes, mode in zip(panels, modes, strict=True):
        draw_bars(axes, _mode_bars(mode), theme)
        seconds = f"{mode['iteration_s']:,.0f} s an iteration"
        axes.set_title(f"{mode['name']}: {seconds}, gain {mode['gain']:.2f}", fontsize=8.5, pad=3)
    panels[-1].set_xlabel("Seconds")
    panels[-1].set_xlim(left=0)
    add_legend(figure, _SIMULATED, theme, width)
    return figure


def _mode_bars(mode: PlannedMode) -> dict[str, list[Bar]]:
    """Return the bars of a way of generating; those of ranks that train alone lie below its engines."""
    rows = drawn_rows(mode["engines"])
    height = len(rows)
    origin = mode["rounds"][0]["begin_s"]
    bars: dict[str, list[Bar]] = {activity: [] for activity in ("wait", "engine", "grade", "update")}
    for planned in mode["rounds"]:
        begin = planned["begin_s"] - origin
        ends = planned["engine_end_s"]
        last_end = max(ends) - origin
        bars["wait"].append((begin, last_end - begin, 0, height))
        for position, index in enumerate(rows):
            bars["engine"].append((begin, ends[index] - origin - begin, position, 0.9))
        graded = planned["graded_s"] - origin
        bars["grade"].append((last_end, graded - last_end, 0, height))
        # As high as there are trainers for each generator, so that areas are GPU hours.
        trainers = height * (mode["world"] / mode["generators"] - 1) if mode["generators"] else height
        bottom = height + 1 if mode["generators"] else 0
        for train_begin, train_end in planned["train_s"]:
            bars["update"].append((train_begin - origin, train_end - train_begin, bottom, trainers))
    return bars
