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

_STALENESS = re.compile(r"rollout/staleness_share_(\d+)")
_QUEUE = "rollout/postponed_prompts"


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
    first, last = lines[0]["step"], lines[-1]["step"]
    raise ExperimentError(f"--iteration {iteration}: {TIMELINE} has iterations {first} to {last}; choose one of these")


def draw_ranks(line: TimelineLine, theme: Theme, width: float = WIDE) -> Figure:
    """Draw what each rank did in an iteration, a row for each rank, the first at the top."""
    ranks = drawn_rows(len(line["ends"]))
    height = min(6.0, 1.4 + 0.16 * len(ranks))
    figure = Figure(figsize=(width, height), layout="constrained")
    total = len(line["ends"])
    selection = "" if len(ranks) == total else f", {len(ranks)} of {total}"
    axes = figure.add_subplot(title=f"RL: iteration {line['step']} by rank{selection}", xlabel="Seconds")
    bars: dict[str, list[Bar]] = {activity: [] for activity in ACTIVITIES}
    for position, rank in enumerate(ranks):
        for activity, begin, end in _activities(line, rank):
            bars.setdefault(activity, []).append((begin, end - begin, position, 0.9))
    drawn = {activity: title for activity, title in ACTIVITIES.items() if bars[activity]}
    draw_bars(axes, {activity: bars[activity] for activity in drawn}, theme)
    if total <= 16:
        axes.set_yticks([position + 0.45 for position in range(total)], [f"rank {rank}" for rank in range(total)])
    axes.set_xlim(left=0)
    add_legend(figure, drawn, theme, width)
    return figure


def _activities(line: TimelineLine, rank: int) -> Iterator[tuple[str, float, float]]:
    """Yield each activity of a rank, and the seconds of its begin and end."""
    spans = pairwise([0.0, *line["ends"][rank]])
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
    if stage.values(_QUEUE):
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
        axes.set_title("Prompts that wait for a later round")
        draw_curve(axes, *stage.series(_QUEUE), theme.models[3], "{:.0f}", smooth=False)
        axes.set_ylim(bottom=0)
    if panels[-1] != "lengths":
        axes_of[panels[-1]].set_xlabel("Iteration")
    return figure


def _draw_lengths(axes: Axes, stage: Stage, lines: Sequence[TimelineLine], theme: Theme) -> None:
    """Draw the lengths of the last short round and, with oversampled rounds, of the last long one and the cut."""
    long_steps, long_values = stage.series("rollout/long_round")
    long_rounds = {step for step, value in zip(long_steps, long_values, strict=True) if value}
    short_lines = [line for line in lines if line["step"] not in long_rounds]
    long_lines = [line for line in lines if line["step"] in long_rounds]
    axes.set_title("Lengths of responses", pad=16)
    axes.set_xlabel("Tokens")
    for title, group, colour in (("short round", short_lines, 1), ("long round", long_lines, 2)):
        if not group:
            continue
        line = group[-1]
        width, counts = line["lengths"]["width"], line["lengths"]["counts"]
        edges = [index * width for index in range(len(counts) + 1)]
        label = f"{title}, iteration {line['step']}" if long_steps else f"iteration {line['step']}"
        axes.stairs(counts, edges, fill=True, alpha=0.6, color=theme.models[colour], label=label)
    longest = max(line["lengths"]["width"] * _last_bin(line) for line in [*short_lines[-1:], *long_lines[-1:]])
    axes.set_xlim(0, longest * 1.02)
    axes.legend(loc="upper right")
    step = short_lines[-1]["step"] if short_lines and long_steps else None
    cuts = dict(zip(*stage.series("response/length_max"), strict=True))
    if step in cuts:
        axes.axvline(cuts[step], color=theme.muted, linestyle=(0, (4, 3)), linewidth=1, gid="cut")
        axes.annotate(
            f"the short round ends: {cuts[step]:,.0f} tokens",
            xy=(cuts[step], 1),
            # x in tokens, y as a share of the height: the label lies above the bars.
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            xytext=(0, 3),
            ha="center",
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


def _staleness(stage: Stage) -> list[int]:
    """Return the ages, in updates, for which the run logged a share of tokens."""
    ages = set()
    for line in stage.metrics:
        for key in line:
            if match := _STALENESS.fullmatch(key):
                ages.add(int(match[1]))
    return sorted(ages)


def _draw_staleness(axes: Axes, stage: Stage, ages: Sequence[int], theme: Theme) -> None:
    """Draw the share of the tokens by the updates between their policy and the one that learns from them."""
    axes.set_title("Share of tokens by the age of their policy, in updates")
    for age in ages:
        steps, shares = stage.series(f"rollout/staleness_share_{age}")
        axes.plot(steps, shares, color=theme.models[age % len(theme.models)], label=f"{age}")
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.set_ylim(0, 1.02)
    use_whole_steps(axes)
    axes.legend(loc="best", ncols=len(ages))
