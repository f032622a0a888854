"""Draw the paper's figures from an experiment's folder: losses, dynamics of the RL, accuracies, behaviours.

Each is drawn once per theme: light ones go to ``figures/`` as PNG and PDF, both into the report.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ovr_megatron.analysis.bars import draw_accuracy, draw_behaviours
from ovr_megatron.analysis.curves import average_window, draw_curve, use_whole_steps
from ovr_megatron.analysis.experiment import Experiment, Stage
from ovr_megatron.analysis.tail import draw_ranks, draw_tail, has_tail, read_timeline, select_iteration
from ovr_megatron.analysis.themes import LIGHT, WIDE, Theme, legend_columns
from ovr_megatron.evaluation.statistics import moving_average

DPI = 180
MAX_SOURCES = 8  # lines of a figure


@dataclass(frozen=True)
class Chart:
    """A drawn figure with its caption."""

    name: str
    caption: str
    figure: Figure
    theme: Theme

    @property
    def png(self) -> bytes:
        """The figure as an image."""
        return self._file("png", dpi=DPI)

    @property
    def pdf(self) -> bytes:
        """The figure for print."""
        return self._file("pdf", metadata={"CreationDate": None})  # the same bytes for the same numbers

    def _file(self, form: str, **options: object) -> bytes:
        buffer = io.BytesIO()
        # Matplotlib reads some settings, such as the background, only while it saves.
        with matplotlib.rc_context(self.theme.settings):
            self.figure.savefig(buffer, format=form, **options)
        return buffer.getvalue()


def draw_figures(experiment: Experiment, theme: Theme, width: float = WIDE) -> list[Chart]:
    """Draw every figure for which the folder holds numbers, in the order of the recipe; ``width`` in inches."""
    # Matplotlib reads most settings while it draws. Without pyplot, which would hold every figure open.
    with matplotlib.rc_context(theme.settings):
        charts = []
        for name, caption, figure in _figures(experiment, theme, width):
            charts.append(Chart(name, caption, figure, theme))
        return charts


def _figures(experiment: Experiment, theme: Theme, width: float) -> Iterator[tuple[str, str, Figure]]:
    """Yield name, caption and figure of each."""
    for name in ("base", "cold_start"):
        stage = experiment.stages.get(name)
        if stage and stage.values("loss/train"):
            caption = f"{stage.title}: cross entropy of the target tokens; faint: each step, strong: moving average."
            yield f"{name}_loss", caption, draw_loss(stage, theme, width)
    rl = experiment.stages.get("rl")
    if rl:
        yield from _rl_figures(rl, theme, width)
        yield from _tail_figures(rl, experiment.iteration, theme, width)
    if evaluations := list_periodic_evaluations(experiment):
        caption = "Greedy accuracy of the live weights on the chosen problem sets while a stage trains."
        yield "evaluation", caption, draw_evaluations(evaluations, theme, width)
    if experiment.sets:
        caption = "Greedy accuracy on held-out problems, with Wilson's 95 % interval."
        yield "accuracy", caption, draw_accuracy(experiment, theme, width)
    if experiment.shows_behaviours:
        caption = "Traces that show each behaviour, and how far the visual ones follow the linguistic ones."
        yield "behaviours", caption, draw_behaviours(experiment, theme, width)


def _rl_figures(stage: Stage, theme: Theme, width: float) -> Iterator[tuple[str, str, Figure]]:
    if stage.values("reward/mean"):
        caption = "PPO: mean reward and response length. Dashed: the curriculum allows longer sequences from here on."
        yield "rl_dynamics", caption, draw_dynamics(stage, theme, width)
    if list_sources(stage):
        total = len(_all_sources(stage))
        selection = f" The first {MAX_SOURCES} of {total}." if total > MAX_SOURCES else ""
        caption = f"PPO by source: mean reward and response length, moving averages.{selection}"
        yield "rl_sources", caption, draw_sources(stage, theme, width)
    has_health = any(stage.values(key) for key, _, _ in _HEALTH)
    if has_health:
        caption = "PPO under the hood. Mismatch: largest difference of rollout and trainer log-probabilities."
        yield "rl_health", caption + _first_values(stage), draw_health(stage, theme, width)


def _first_values(stage: Stage) -> str:
    """Return a sentence on the critic's values before any training; empty where they were not logged."""
    first = stage.metrics[0]
    keys = ("critic/value_mean", "critic/return_mean", "critic/value_std", "critic/explained_variance")
    if not all(key in first for key in keys):
        return ""
    mean, returns, spread, explained = (first[key] for key in keys)
    return (
        f" The critic's first values had the mean {mean:.2g} (returns {returns:.2g}) and the standard deviation "
        f"{spread:.2g}, and explained {explained:.2f} of the returns' variance."
    )


def _tail_figures(stage: Stage, iteration: int | None, theme: Theme, width: float) -> Iterator[tuple[str, str, Figure]]:
    lines = read_timeline(stage)
    if line := select_iteration(lines, iteration):
        caption = "What each rank does in one iteration. Engines that are done wait for the longest responses."
        yield "rl_timeline", caption, draw_ranks(line, theme, width)
    if has_tail(stage, lines):
        caption = "The tail: lengths of responses, and what is waited for, stale or postponed because of the longest."
        yield "rl_tail", caption, draw_tail(stage, lines, theme, width)


def write_figures(experiment: Experiment) -> list[Path]:
    """Write ``figures/NAME.png`` and ``.pdf`` in the light theme, and return the paths."""
    folder = experiment.dir / "figures"
    folder.mkdir(exist_ok=True)
    paths = []
    for chart in draw_figures(experiment, LIGHT):
        files = {"png": chart.png, "pdf": chart.pdf}
        for suffix, content in files.items():
            path = folder / f"{chart.name}.{suffix}"
            path.write_bytes(content)
            paths.append(path)
    return paths


def draw_loss(stage: Stage, theme: Theme, width: float = WIDE) -> Figure:
    """Draw the loss by optimizer step (paper, figure 3a)."""
    figure = Figure(figsize=(width, 3.0), layout="constrained")
    axes = figure.add_subplot(title=f"{stage.title}: loss", xlabel="Step")
    steps, losses = stage.series("loss/train")
    # The colour of the model that the stage trains, as in the bars.
    index = 0 if stage.name == "base" else 1
    colour = theme.models[index]
    draw_curve(axes, steps, losses, colour, "{:.3f}")
    steps, losses = stage.series("validation/loss")
    if losses:
        axes.plot(steps, losses, color=theme.models[2], marker="o", label="validation")
        axes.legend(loc="upper right")
    axes.set_ylim(bottom=0)
    return figure


def draw_dynamics(stage: Stage, theme: Theme, width: float = WIDE) -> Figure:
    """Draw mean reward above mean response length by iteration, with the curriculum's switches (paper, figure 3b)."""
    figure = Figure(figsize=(width, 4.6), layout="constrained")
    reward, length = figure.subplots(2, 1, sharex=True)
    draw_curve(reward, *stage.series("reward/mean"), theme.models[2], "{:.2f}")
    draw_curve(length, *stage.series("response/length"), theme.models[3], "{:.0f}")
    reward.set_title("RL: mean reward", pad=22)  # room for the switches' labels
    length.set_title("RL: mean response length in tokens")
    length.set_xlabel("Iteration")
    for step, before, after in list_switches(stage):
        for axes in (reward, length):
            axes.axvline(step, color=theme.muted, linestyle=(0, (4, 3)), linewidth=1, gid="switch")
        reward.annotate(
            f"{before:,} to {after:,} tokens",
            xy=(step, 1),
            # x in iterations, y as a share of the height: the label lies above the axes whatever the rewards are.
            xycoords=reward.get_xaxis_transform(),
            textcoords="offset points",
            xytext=(0, 3),
            ha="center",
            va="bottom",
            fontsize=8,
            color=theme.muted,
        )
    return figure


def list_switches(stage: Stage) -> list[tuple[int, int, int]]:
    """Return where the curriculum changed: first iteration of the new limit, limit before, limit after."""
    steps, limits = stage.series("curriculum/max_tokens")
    switches = []
    pairs = itertools.pairwise(limits)
    for step, (before, after) in zip(steps[1:], pairs, strict=True):
        if before != after:
            switches.append((step, int(before), int(after)))
    return switches


_BY_SOURCE = "reward/source/"


def list_sources(stage: Stage) -> list[str]:
    """Return the sources whose rewards the RL logged one by one, the first `MAX_SOURCES` of them."""
    return _all_sources(stage)[:MAX_SOURCES]


def _all_sources(stage: Stage) -> list[str]:
    keys = [key for key in _metric_keys(stage) if key.startswith(_BY_SOURCE)]
    return sorted(key.removeprefix(_BY_SOURCE) for key in keys)


def _metric_keys(stage: Stage) -> set[str]:
    """Return the names of all metrics that any step logged."""
    return set[str]().union(*stage.metrics)


def draw_sources(stage: Stage, theme: Theme, width: float = WIDE) -> Figure:
    """Draw reward above response length, a line for each source.

    This is the paper's figure 6: for perception the reward grows while the length does not.
    """
    figure = Figure(figsize=(width, 5.0), layout="constrained")
    rewards, lengths = figure.subplots(2, 1, sharex=True)
    panels = (
        (rewards, _BY_SOURCE, "RL: mean reward by source"),
        (lengths, "response/length/source/", "RL: mean response length in tokens"),
    )
    # Ten colours for at most `MAX_SOURCES` lines.
    colours = matplotlib.colormaps["tab10"].colors
    sources = list_sources(stage)
    for axes, group, title in panels:
        axes.set_title(title)
        for source, colour in zip(sources, colours, strict=False):
            steps, values = stage.series(group + source)
            means = moving_average(values, average_window(values))
            axes.plot(steps, means, color=colour, label=source)
    lengths.set_xlabel("Iteration")
    use_whole_steps(lengths)
    # The lines of one panel: both have the same sources in the same colours.
    lines, labels = rewards.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=legend_columns(width))
    return figure


_HEALTH = (
    ("policy/entropy", "Entropy of the policy", "{:.2f}"),
    ("critic/explained_variance", "Explained variance of the critic", "{:.2f}"),
    ("response/stopped", "Share of responses that stop", "{:.2f}"),
    ("rollout/mismatch_max", "Largest mismatch", "{:.0e}"),
)


def draw_health(stage: Stage, theme: Theme, width: float = WIDE) -> Figure:
    """Draw the metrics that show whether a PPO run is healthy, by iteration."""
    rows, columns = (2, 2) if width == WIDE else (4, 1)
    figure = Figure(figsize=(width, 2.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True).flat
    for axes, (key, title, form) in zip(panels, _HEALTH, strict=True):
        steps, values = stage.series(key)
        axes.set_title(title, fontsize=9.5)
        if not values:
            axes.text(
                0.5,
                0.5,
                "not logged",
                transform=axes.transAxes,
                ha="center",
                color=theme.muted,
            )
            continue
        # The mismatch spans orders of magnitude; a moving average would hide its peaks.
        is_mismatch = key == "rollout/mismatch_max"
        draw_curve(axes, steps, values, theme.models[2], form, smooth=not is_mismatch)
        if is_mismatch and min(values) > 0:  # a logarithmic axis has no place for a 0
            axes.set_yscale("log")
    return figure


def list_periodic_evaluations(experiment: Experiment) -> list[tuple[Stage, list[str]]]:
    """Return the stages that evaluated while they trained, and the keys of the accuracies in their metrics."""
    evaluations = []
    for stage in experiment.stages.values():
        keys = [key for key in _metric_keys(stage) if _is_accuracy(key)]
        if keys:
            evaluations.append((stage, sorted(keys)))
    return evaluations


def _is_accuracy(key: str) -> bool:
    # An accuracy is "evaluation/SET"; deeper keys are details of it.
    return key.startswith("evaluation/") and key.count("/") == 1


def draw_evaluations(evaluations: Sequence[tuple[Stage, list[str]]], theme: Theme, width: float = WIDE) -> Figure:
    """Draw accuracy by step, a row for each stage and a line for each problem set (paper, figure 4)."""
    count = len(evaluations)
    figure = Figure(figsize=(width, 2.6 * count), layout="constrained")
    # Squeezed, a single row would be no array.
    panels = figure.subplots(count, 1, squeeze=False)
    for axes, (stage, keys) in zip(panels[:, 0], evaluations, strict=True):
        _draw_accuracies(axes, stage, keys, theme)
    return figure


def _draw_accuracies(axes: Axes, stage: Stage, keys: Sequence[str], theme: Theme) -> None:
    unit = "Iteration" if stage.name == "rl" else "Step"
    axes.set_title(f"{stage.title}: accuracy while it trains")
    axes.set_xlabel(unit)
    for index, key in enumerate(keys):
        steps, values = stage.series(key)
        _, _, problem_set = key.partition("/")
        axes.plot(
            # Steps count from 0: an evaluation logged with step 99 is one of the weights after 100 steps.
            [step + 1 for step in steps],
            values,
            marker="o",
            markersize=4,
            color=theme.models[(index + 1) % len(theme.models)],
            label=problem_set,
        )
    use_whole_steps(axes)
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.set_ylim(0, 1.02)  # a marker at 100 % is not cut
    axes.legend(loc="best")
