"""Draw what the longest responses cost: timeline of the ranks, lengths, idle share, stale tokens, postponed prompts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ovr_megatron.analysis.curves import draw_curve, use_whole_steps
from ovr_megatron.analysis.experiment import ExperimentError, Stage
from ovr_megatron.analysis.themes import WIDE, Theme
from ovr_megatron.analysis.timelines import ACTIVITIES, Bar, add_legend, draw_bars, drawn_rows
from ovr_megatron.ppo.timeline import TimelineRecord
from ovr_megatron.runtime.runlog import TIMELINE
from ovr_megatron.runtime.step_lines import read_metrics

TableRow = Mapping[str, object]
"""Cells by column; the columns are as many as metrics, sources and values of k."""

_STALENESS = re.compile(r"rollout/staleness_share/(\d+)")
_NAMED_RANKS = 16  # a timeline of more has no room for their names
# What waits for a long round, and what the next round goes on with.
_QUEUES = {"rollout/postponed_prompts": "for a long round", "rollout/unfinished_prompts": "to be continued"}


class TimelineLine(TimelineRecord):
    """A line of a run's ``timeline.jsonl``."""

    step: int


def read_timeline(stage: Stage) -> list[TimelineLine]:
    """Return the lines of a run's timeline, none where it has no such file."""
    path = stage.dir / TIMELINE
    return cast(list[TimelineLine], read_metrics(path)) if path.is_file() else []


def select_iteration(lines: Sequence[TimelineLine], iteration: int | None) -> TimelineLine | None:
    """Return the line of ``iteration``, of the last one with None; None without a timeline.

    Raises:
        ExperimentError: the timeline does not have the iteration.
    """
    if iteration is None or not lines:
        return lines[-1] if lines else None
    for line in lines:
        if line["step"] == iteration:
            return line
    known = f"{lines[0]['step']} to {lines[-1]['step']}"
    raise ExperimentError(f"--iteration {iteration}: {TIMELINE} has iterations {known}; choose one of these")


def draw_ranks(line: TimelineLine, theme: Theme, width: float = WIDE) -> Figure:
    """Draw what each rank did in an iteration, a row for each rank, the first at the top."""
    total = len(line["ends"])
    ranks = drawn_rows(total)
    # A narrow figure has more rows of the legend, below the axes.
    height = min(6.0, (1.4 if width == WIDE else 2.0) + 0.16 * len(ranks))
    figure = Figure(figsize=(width, height), layout="constrained")
    selection = ""
    if len(ranks) < total:
        selection = f", {len(ranks)} of {total}"
    axes = figure.add_subplot(title=f"RL: iteration {line['step']} by rank{selection}", xlabel="Seconds")
    bars: dict[str, list[Bar]] = {activity: [] for activity in ACTIVITIES}
    for position, rank in enumerate(ranks):
        for activity, begin, end in _activities(line, rank):
            bars.setdefault(activity, []).append((begin, end - begin, position, 0.9))
    drawn = {activity: title for activity, title in ACTIVITIES.items() if bars[activity]}
    draw_bars(axes, {activity: bars[activity] for activity in drawn}, theme)
    if total <= _NAMED_RANKS:
        # A bar is 0.9 rows high.
        middles = [position + 0.45 for position in range(total)]
        axes.set_yticks(middles, [f"rank {rank}" for rank in range(total)])
    axes.set_xlim(left=0)
    add_legend(figure, drawn, theme, width)
    return figure


def _activities(line: TimelineLine, rank: int) -> Iterator[tuple[str, float, float]]:
    """Yield each activity of a rank, and the seconds of its begin and end."""
    spans = pairwise([line["begins"][rank], *line["ends"][rank]])
    for activity, (begin, end) in zip(line["activities"], spans, strict=True):
        yield activity, begin, end


def timeline_rows(line: TimelineLine) -> Iterator[TableRow]:
    """Yield a row for each activity of each rank, in seconds."""
    for rank in range(len(line["ends"])):
        for activity, begin, end in _activities(line, rank):
            yield {"step": line["step"], "rank": rank, "activity": activity, "begin": begin, "end": end}


def length_rows(lines: Sequence[TimelineLine]) -> Iterator[TableRow]:
    """Yield a row for each bin of lengths that has responses, of each iteration."""
    for line in lines:
        width = line["lengths"]["width"]
        for index, count in enumerate(line["lengths"]["counts"]):
            if count:
                yield {"step": line["step"], "from": index * width, "below": (index + 1) * width, "responses": count}


def has_tail(stage: Stage, lines: Sequence[TimelineLine]) -> bool:
    """Return whether there is anything for `draw_tail`."""
    return bool(lines or stage.values("timing/rollout_idle"))


def draw_tail(stage: Stage, lines: Sequence[TimelineLine], theme: Theme, width: float = WIDE) -> Figure:
    """Draw lengths of responses, idle share of the engines, stale tokens and postponed prompts, where there are any."""
    shares = _staleness(stage)
    panels = []
    if lines:
        panels.append("lengths")
    if stage.values("timing/rollout_idle"):
        panels.append("idle")
    if shares:
        panels.append("staleness")
    if any(stage.values(key) for key in _QUEUES):
        panels.append("queue")
    figure = Figure(figsize=(width, 2.1 * len(panels)), layout="constrained")
    axes_of = dict(zip(panels, figure.subplots(len(panels), 1, squeeze=False)[:, 0], strict=True))
    if axes := axes_of.get("lengths"):
        _draw_lengths(axes, stage, lines, theme)
    if axes := axes_of.get("idle"):
        steps, values = _idle_share(stage)
        axes.set_title("Share of generation that engines wait for the last one")
        draw_curve(axes, steps, values, theme.models[1], "{:.0%}")
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        axes.set_ylim(bottom=0)
    if axes := axes_of.get("staleness"):
        _draw_staleness(axes, stage, shares, theme)
    if axes := axes_of.get("queue"):
        _draw_queues(axes, stage, theme)
    if panels[-1] != "lengths":
        axes_of[panels[-1]].set_xlabel("Iteration")
    return figure


def _draw_queues(axes: Axes, stage: Stage, theme: Theme) -> None:
    """Draw the prompts that wait for a later round after each iteration."""
    axes.set_title("Prompts that wait for a later round")
    for (key, title), colour in zip(_QUEUES.items(), theme.models[3:1:-1], strict=True):
        steps, counts = stage.series(key)
        if counts:
            axes.plot(steps, counts, color=colour, label=title)
    use_whole_steps(axes)
    axes.set_ylim(bottom=0)
    axes.legend(loc="best")


def _draw_lengths(axes: Axes, stage: Stage, lines: Sequence[TimelineLine], theme: Theme) -> None:
    """Draw the lengths of the last iteration, or with oversampled rounds those of the last round of each kind."""
    axes.set_title("Lengths of responses", pad=16)
    axes.set_xlabel("Tokens")
    long_rounds = dict(zip(*stage.series("rollout/long_round"), strict=True))
    last_lines: dict[str, TimelineLine] = {}
    for line in lines:
        kind = ""
        if line["step"] in long_rounds:
            kind = "long round, " if long_rounds[line["step"]] else "short round, "
        last_lines[kind] = line
    longest = 0
    for kind, line in last_lines.items():
        width = line["lengths"]["width"]
        counts = line["lengths"]["counts"]
        edges = [index * width for index in range(len(counts) + 1)]
        colour = theme.models[2 if kind.startswith("long") else 1]
        label = f"{kind}iteration {line['step']}"
        axes.stairs(counts, edges, fill=True, alpha=0.6, color=colour, label=label)
        longest = max(longest, width * _last_bin(line))
    # The limit lies far beyond the longest response of many runs.
    axes.set_xlim(0, longest * 1.02)
    axes.legend(loc="best")
    if short := last_lines.get("short round, "):
        _mark_cut(axes, stage, short["step"], theme)


def _mark_cut(axes: Axes, stage: Stage, step: int, theme: Theme) -> None:
    """Mark where the short round ``step`` was cut: no response in it is longer."""
    cuts = dict(zip(*stage.series("response/length_max"), strict=True))
    if step not in cuts:
        return
    axes.axvline(cuts[step], color=theme.muted, linestyle=(0, (4, 3)), linewidth=1, gid="cut")
    axes.annotate(
        f"the short round ends: {cuts[step]:,.0f} tokens",
        xy=(cuts[step], 1),
        # x in tokens, y as a share of the height: the label lies above the bars.
        xycoords=axes.get_xaxis_transform(),
        textcoords="offset points",
        xytext=(0, 3),
        # Beside the line, on the side that has room.
        ha="right" if cuts[step] > axes.get_xlim()[1] / 2 else "left",
        va="bottom",
        fontsize=8,
        color=theme.muted,
    )


def _last_bin(line: TimelineLine) -> int:
    """Return the number of bins up to the last one that has responses, at least 1."""
    last = 1
    for index, count in enumerate(line["lengths"]["counts"], 1):
        if count:
            last = index
    return last


def _idle_share(stage: Stage) -> tuple[list[int], list[float]]:
    """Return the share of generation that engines wait, by iteration."""
    seconds = dict(zip(*stage.series("timing/generate"), strict=True))
    steps: list[int] = []
    shares: list[float] = []
    for step, idle in zip(*stage.series("timing/rollout_idle"), strict=True):
        if seconds.get(step):
            steps.append(step)
            shares.append(idle / seconds[step])
    return steps, shares


def _staleness(stage: Stage) -> dict[int, str]:
    """Return the ages, in updates, for which the run logged a share of tokens, and the name of each share."""
    ages = {}
    for line in stage.metrics:
        for key in line:
            if match := _STALENESS.fullmatch(key):
                ages[int(match[1])] = key
    return dict(sorted(ages.items()))


def _draw_staleness(axes: Axes, stage: Stage, ages: Mapping[int, str], theme: Theme) -> None:
    """Draw the share of the tokens by the updates between their policy and the one that learns from them."""
    axes.set_title("Share of tokens by the age of their policy, in updates")
    for age, key in ages.items():
        steps, shares = stage.series(key)
        axes.plot(steps, shares, color=theme.models[age % len(theme.models)], label=f"{age}")
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.set_ylim(0, 1.02)
    use_whole_steps(axes)
    axes.legend(loc="best", ncols=len(ages))
