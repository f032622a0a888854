"""Draw the paper's figures from an experiment's folder: losses, dynamics of the RL, accuracies, behaviours.

Each is drawn once per theme: light ones go to ``figures/`` as PNG and PDF, both into the report.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ovr_megatron.analysis.experiment import MODELS, Experiment, Stage
from ovr_megatron.evaluation.behaviours import LINGUISTIC, VISUAL, Behaviour
from ovr_megatron.evaluation.statistics import moving_average

WIDE, NARROW = 6.4, 3.9  # inches: for a page, for a phone
DPI = 180
MAX_SOURCES = 8  # lines of a figure


@dataclass(frozen=True)
class Theme:
    """Colours of one look; those of ``models`` in the order of `MODELS`."""

    name: str
    paper: str
    ink: str
    muted: str
    grid: str
    models: tuple[str, ...]

    @property
    def settings(self) -> dict[str, object]:
        """The theme as Matplotlib settings."""
        return {
            "figure.facecolor": self.paper,
            "axes.facecolor": self.paper,
            "savefig.facecolor": self.paper,
            "text.color": self.ink,
            "axes.labelcolor": self.muted,
            "axes.edgecolor": self.grid,
            "xtick.color": self.grid,
            "ytick.color": self.grid,
            "xtick.labelcolor": self.muted,
            "ytick.labelcolor": self.muted,
            "grid.color": self.grid,
            "figure.constrained_layout.h_pad": 0.1,
            "figure.constrained_layout.w_pad": 0.1,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 10.5,
            "axes.titleweight": "bold",
            "axes.titlepad": 10,
            "ytick.major.size": 0,
            "font.size": 9.5,
            "legend.frameon": False,
            "lines.linewidth": 2,
            "lines.solid_capstyle": "round",
        }


LIGHT = Theme("light", "#ffffff", "#1d2127", "#626975", "#e4e2dc", ("#9aa0a8", "#3a7cbd", "#d9652b", "#8660b3"))
DARK = Theme("dark", "#1b1e24", "#e9e7e2", "#a2a8b3", "#333842", ("#868d98", "#69a6e3", "#f0905a", "#b596dd"))
THEMES = (LIGHT, DARK)


Bar = dict[str, Any] | str | None
"""Values ``accuracy``, ``low`` and ``high``; or a word to write instead of a bar, "not run" for None."""


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

    def _file(self, form: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        # Matplotlib reads some settings, such as the background, only while it saves.
        with matplotlib.rc_context(self.theme.settings):
            self.figure.savefig(buffer, format=form, **options)
        return buffer.getvalue()


def draw_figures(experiment: Experiment, theme: Theme, width: float = WIDE) -> list[Chart]:
    """Draw every figure for which the folder holds numbers, in the order of the recipe; ``width`` in inches."""
    # Matplotlib reads most settings while it draws. Without pyplot, which would hold every figure open.
    with matplotlib.rc_context(theme.settings):
        return [Chart(name, caption, figure, theme) for name, caption, figure in _figures(experiment, theme, width)]


def _figures(experiment: Experiment, theme: Theme, width: float) -> Iterator[tuple[str, str, Figure]]:
    """Yield name, caption and figure of each."""
    for name in ("base", "cold_start"):
        stage = experiment.stages.get(name)
        if stage and stage.values("loss/train"):
            caption = f"{stage.title}: cross entropy of the target tokens; faint: each step, strong: moving average."
            yield f"{name}_loss", caption, draw_loss(stage, theme, width)
    stage = experiment.stages.get("rl")
    if stage and stage.values("reward/mean"):
        caption = "PPO: mean reward and response length. Dashed: the curriculum allows longer sequences from here on."
        yield "rl_dynamics", caption, draw_dynamics(stage, theme, width)
    if stage and list_sources(stage):
        total = len(_all_sources(stage))
        selection = f" The first {MAX_SOURCES} of {total}." if total > MAX_SOURCES else ""
        caption = f"PPO by source: mean reward and response length, moving averages.{selection}"
        yield "rl_sources", caption, draw_sources(stage, theme, width)
    if stage and any(stage.values(key) for key, _, _ in _HEALTH):
        caption = "PPO under the hood. Mismatch: largest difference of rollout and trainer log-probabilities."
        yield "rl_health", caption, draw_health(stage, theme, width)
    if evaluations := list_periodic_evaluations(experiment):
        caption = "Greedy accuracy of the live weights on the chosen problem sets while a stage trains."
        yield "evaluation", caption, draw_evaluations(evaluations, theme, width)
    if experiment.sets:
        caption = "Greedy accuracy on held-out problems, with Wilson's 95 % interval."
        yield "accuracy", caption, draw_accuracy(experiment, theme, width)
    if experiment.shows_behaviours:
        caption = "Traces that show each behaviour, and how far the visual ones follow the linguistic ones."
        yield "behaviours", caption, draw_behaviours(experiment, theme, width)


def write_figures(experiment: Experiment) -> list[Path]:
    """Write ``figures/NAME.png`` and ``.pdf`` in the light theme, and return the paths."""
    folder = experiment.dir / "figures"
    folder.mkdir(exist_ok=True)
    paths = []
    for chart in draw_figures(experiment, LIGHT):
        for form, data in (("png", chart.png), ("pdf", chart.pdf)):
            path = folder / f"{chart.name}.{form}"
            path.write_bytes(data)
            paths.append(path)
    return paths


def draw_loss(stage: Stage, theme: Theme, width: float = WIDE) -> Figure:
    """Draw the loss by optimizer step (paper, figure 3a)."""
    figure = Figure(figsize=(width, 3.0), layout="constrained")
    axes = figure.add_subplot(title=f"{stage.title}: loss", xlabel="Step")
    steps, losses = stage.series("loss/train")
    _curve(axes, steps, losses, theme.models[0 if stage.name == "base" else 1], "{:.3f}")
    axes.set_ylim(bottom=0)
    return figure


def draw_dynamics(stage: Stage, theme: Theme, width: float = WIDE) -> Figure:
    """Draw mean reward above mean response length by iteration, with the curriculum's switches (paper, figure 3b)."""
    figure = Figure(figsize=(width, 4.6), layout="constrained")
    reward, length = figure.subplots(2, 1, sharex=True)
    _curve(reward, *stage.series("reward/mean"), theme.models[2], "{:.2f}")
    _curve(length, *stage.series("response/length"), theme.models[3], "{:.0f}")
    reward.set_title("RL: mean reward", pad=22)  # room for the switches' labels
    length.set_title("RL: mean response length in tokens")
    length.set_xlabel("Iteration")
    for step, before, after in list_switches(stage):
        for axes in (reward, length):
            axes.axvline(step, color=theme.muted, linestyle=(0, (4, 3)), linewidth=1, gid="switch")
        position = {"xy": (step, 1), "xycoords": reward.get_xaxis_transform(), "textcoords": "offset points"}
        text = f"{before:,} to {after:,} tokens"
        reward.annotate(text, **position, xytext=(0, 3), ha="center", va="bottom", fontsize=8, color=theme.muted)
    return figure


def list_switches(stage: Stage) -> list[tuple[int, int, int]]:
    """Return where the curriculum changed: first iteration of the new limit, limit before, limit after."""
    steps, limits = stage.series("curriculum/max_tokens")
    changes = zip(steps[1:], limits, limits[1:], strict=False)
    return [(step, int(before), int(after)) for step, before, after in changes if before != after]


_BY_SOURCE = "reward/source/"


def list_sources(stage: Stage) -> list[str]:
    """Return the sources whose rewards the RL logged one by one, the first `MAX_SOURCES` of them."""
    return _all_sources(stage)[:MAX_SOURCES]


def _all_sources(stage: Stage) -> list[str]:
    return sorted(key.removeprefix(_BY_SOURCE) for key in _metric_keys(stage) if key.startswith(_BY_SOURCE))


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
    for axes, group, title in panels:
        axes.set_title(title)
        for source, colour in zip(list_sources(stage), colours, strict=False):
            steps, values = stage.series(group + source)
            window = max(1, len(values) // 20)
            axes.plot(steps, moving_average(values, window), color=colour, label=source)
    lengths.set_xlabel("Iteration")
    lengths.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    lines, labels = rewards.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=4 if width == WIDE else 2)
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
    for axes, (key, title, form) in zip(figure.subplots(rows, columns, sharex=True).flat, _HEALTH, strict=True):
        steps, values = stage.series(key)
        axes.set_title(title, fontsize=9.5)
        if not values:
            axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color=theme.muted)
            continue
        _curve(axes, steps, values, theme.models[2], form, smooth=key != "rollout/mismatch_max")
        # The mismatch spans orders of magnitude; a moving average would hide its peaks.
        if key == "rollout/mismatch_max" and min(values) > 0:
            axes.set_yscale("log")
    return figure


def list_periodic_evaluations(experiment: Experiment) -> list[tuple[Stage, list[str]]]:
    """Return the stages that evaluated while they trained, and the keys of the accuracies in their metrics."""
    evaluations = []
    for stage in experiment.stages.values():
        # An accuracy is "evaluation/SET"; deeper keys are details of it.
        keys = [key for key in _metric_keys(stage) if key.startswith("evaluation/") and key.count("/") == 1]
        if keys:
            evaluations.append((stage, sorted(keys)))
    return evaluations


def draw_evaluations(evaluations: Sequence[tuple[Stage, list[str]]], theme: Theme, width: float = WIDE) -> Figure:
    """Draw accuracy by step, a row for each stage and a line for each problem set (paper, figure 4)."""
    figure = Figure(figsize=(width, 2.6 * len(evaluations)), layout="constrained")
    rows = figure.subplots(len(evaluations), 1, squeeze=False)[:, 0]
    for axes, (stage, keys) in zip(rows, evaluations, strict=True):
        axes.set_title(f"{stage.title}: accuracy while it trains")
        axes.set_xlabel("Iteration" if stage.name == "rl" else "Step")
        for index, key in enumerate(keys):
            steps, values = stage.series(key)
            label = key.partition("/")[2]
            colour = theme.models[(index + 1) % len(theme.models)]
            # Steps count from 0: an evaluation logged with step 99 is one of the weights after 100 steps.
            steps_done = [step + 1 for step in steps]
            axes.plot(steps_done, values, marker="o", markersize=4, color=colour, label=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        axes.set_ylim(0, 1.02)  # a marker at 100 % is not cut
        axes.legend(loc="best")
    return figure


def draw_accuracy(experiment: Experiment, theme: Theme, width: float = WIDE) -> Figure:
    """Draw the accuracy of each model on each problem set, with confidence intervals."""
    sets = experiment.sets
    figure = Figure(figsize=(width, 3.6), layout="constrained")
    axes = figure.add_subplot(title="Accuracy on held-out problems")
    scores = {model: [experiment.score(model, name) for name in sets] for model in MODELS}
    _draw_bars(axes, theme, list(sets.values()), scores)
    axes.set_ylim(0, 1.08)  # room for the numbers above the bars
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    _draw_models_legend(figure, theme, width)
    return figure


def draw_behaviours(experiment: Experiment, theme: Theme, width: float = WIDE) -> Figure:
    """Draw the emergence rate of each behaviour and the transfer rate of each pair, with 95 % intervals.

    This is the paper's figure 5.
    """
    checkpoints = experiment.behaviours["checkpoints"]
    figure = Figure(figsize=(width, 7.4), layout="constrained")
    linguistic_axes, visual_axes, transfer_axes = figure.subplots(3, 1)
    panels = ((linguistic_axes, "Linguistic", LINGUISTIC), (visual_axes, "Visual", VISUAL))
    for axes, title, behaviours in panels:
        rates = {model: _emergence_bars(checkpoints.get(model, {}), behaviours) for model in MODELS}
        _draw_bars(axes, theme, _titles(behaviours), rates)
        axes.set_title(f"{title} behaviours: share of traces")
    transfer = {model: _transfer_bars(checkpoints.get(model, {})) for model in MODELS}
    _draw_bars(transfer_axes, theme, _titles(LINGUISTIC), transfer)
    transfer_axes.set_title("Transfer: visual over linguistic")
    _draw_models_legend(figure, theme, width)
    return figure


def _titles(behaviours: Sequence[Behaviour]) -> list[str]:
    """Return the titles, broken after their first word."""
    return [behaviour.title.replace(" ", "\n", 1) for behaviour in behaviours]


def _emergence_bars(checkpoint: Mapping[str, Any], behaviours: Sequence[Behaviour]) -> list[Bar]:
    counts = checkpoint.get("behaviours", {})
    shares = [counts.get(behaviour.name, {}).get("emergence") for behaviour in behaviours]
    return [share and {**share, "accuracy": share["rate"]} for share in shares]


def _transfer_bars(checkpoint: Mapping[str, Any]) -> list[Bar]:
    """Return a bar for each pair; "none" where the linguistic behaviour never occurred, so that there is no ratio."""
    transfer = checkpoint.get("transfer", {})
    bars: list[Bar] = []
    for behaviour in LINGUISTIC:
        ratio = transfer.get(behaviour.name)
        if not ratio:
            bars.append(None)
        elif ratio["value"] is None:
            bars.append("none")
        else:
            bars.append({**ratio, "accuracy": ratio["value"]})
    return bars


def _draw_bars(axes: Axes, theme: Theme, groups: Sequence[str], scores: Mapping[str, Sequence[Bar]]) -> None:
    """Draw a group of bars for each of ``groups``, with a bar for each of `MODELS`, its interval and its value."""
    step = 0.82 / len(MODELS)
    for index, (model, title) in enumerate(MODELS.items()):
        offset = (index - (len(MODELS) - 1) / 2) * step
        positions = [group + offset for group in range(len(groups))]
        # A group without a value has a word in the place of its bar.
        bars = {x: score for x, score in zip(positions, scores[model], strict=True) if isinstance(score, dict)}
        axes.bar(
            list(bars),
            [score["accuracy"] for score in bars.values()],
            yerr=_errors(list(bars.values())),
            width=step * 0.9,
            color=theme.models[index],
            label=title,
            error_kw={"ecolor": theme.ink, "elinewidth": 1, "capsize": 2, "alpha": 0.7},
        )
        label: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
        for x, score in zip(positions, scores[model], strict=True):
            if isinstance(score, dict):
                axes.annotate(f"{100 * score['accuracy']:.0f}", (x, score["high"]), (0, 3), **label)
            else:
                axes.annotate(score or "not run", (x, 0.0), (0, 3), **label, rotation=90, color=theme.muted)
    axes.set_xticks(range(len(groups)), groups)
    axes.tick_params(axis="x", length=0, labelcolor=theme.ink)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.margins(y=0.15)
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))


def _draw_models_legend(figure: Figure, theme: Theme, width: float) -> None:
    keys = [Patch(color=colour, label=title) for colour, title in zip(theme.models, MODELS.values(), strict=True)]
    columns = 4 if width == WIDE else 2
    figure.legend(handles=keys, loc="outside lower center", ncols=columns, handlelength=1, handleheight=1)


def _errors(scores: Sequence[dict[str, float]]) -> list[list[float]]:
    """Return the lengths of the error bars below and above the values."""
    # A value may lie just outside of its interval, by rounding; Matplotlib refuses negative lengths.
    below = [max(0.0, score["accuracy"] - score["low"]) for score in scores]
    above = [max(0.0, score["high"] - score["accuracy"]) for score in scores]
    return [below, above]


def _curve(
    axes: Axes, steps: Sequence[int], values: Sequence[float], colour: str, form: str, smooth: bool = True
) -> None:
    """Plot ``values``, faint, with a strong moving average over a twentieth of the run, and label the last mean."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if not values:
        return
    window = max(1, len(values) // 20) if smooth else 1
    strong = moving_average(values, window)
    if window > 1:
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.4)
    # A line through a single point would not be seen.
    axes.plot(steps, strong, color=colour, marker="o" if len(values) == 1 else None)
    # The label lies beside the axes, where Matplotlib would clip it.
    position = {"xy": (steps[-1], strong[-1]), "xytext": (5, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(form.format(strong[-1]), **position, color=colour, fontweight="bold", annotation_clip=False)
