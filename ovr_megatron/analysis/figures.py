"""The paper's figures from an experiment's folder: losses, dynamics of the RL, accuracies, behaviours.

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
from ovr_megatron.evaluation.behaviours import LINGUISTIC, VISUAL
from ovr_megatron.evaluation.statistics import moving_average

WIDE, NARROW = 6.4, 3.9  # inches: for a page, for a phone
DPI = 180
MAX_SOURCES = 8  # lines of a figure


@dataclass(frozen=True)
class Theme:
    """Colours of one look; ``models`` in the order of `MODELS`."""

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
"""``accuracy``, ``low`` and ``high``; or what to say instead, "not run" where there is nothing."""


@dataclass(frozen=True)
class Chart:
    """A drawn figure, and what it shows in words."""

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
        return self._file("pdf", metadata={"CreationDate": None})

    def _file(self, form: str, **how: Any) -> bytes:
        buffer = io.BytesIO()
        with matplotlib.rc_context(self.theme.settings):
            self.figure.savefig(buffer, format=form, **how)
        return buffer.getvalue()


def draw(experiment: Experiment, theme: Theme, width: float = WIDE) -> list[Chart]:
    """Every figure for which the folder holds numbers, in the order of the recipe; ``width`` in inches."""
    with matplotlib.rc_context(theme.settings):
        return [Chart(name, told, figure, theme) for name, told, figure in _drawn(experiment, theme, width)]


def _drawn(experiment: Experiment, theme: Theme, width: float) -> Iterator[tuple[str, str, Figure]]:
    """Name, caption and figure."""
    for name in ("base", "cold_start"):
        stage = experiment.stages.get(name)
        if stage and stage.values("loss/train"):
            caption = f"{stage.title}: cross entropy of the target tokens; faint: each step, strong: moving average."
            yield f"{name}_loss", caption, loss_figure(stage, theme, width)
    stage = experiment.stages.get("rl")
    if stage and stage.values("reward/mean"):
        caption = "PPO: mean reward and response length. Dashed: the curriculum allows longer sequences from here on."
        yield "rl_dynamics", caption, dynamics_figure(stage, theme, width)
    if stage and sources(stage):
        some = (
            f" The first {len(sources(stage))} of {len(_sources(stage))}." if len(_sources(stage)) > MAX_SOURCES else ""
        )
        caption = f"PPO by source: mean reward and response length, moving averages.{some}"
        yield "rl_sources", caption, sources_figure(stage, theme, width)
    if stage and any(stage.values(key) for key, _, _ in _HEALTH):
        caption = "PPO under the hood. Mismatch: largest difference of rollout and trainer log-probabilities."
        yield "rl_health", caption, health_figure(stage, theme, width)
    if asked := evaluated(experiment):
        caption = "Greedy accuracy of the live weights on the chosen problem sets while a stage trains."
        yield "evaluation", caption, evaluation_figure(asked, theme, width)
    if experiment.sets:
        caption = "Greedy accuracy on held-out problems, with Wilson's 95 % interval."
        yield "accuracy", caption, accuracy_figure(experiment, theme, width)
    if experiment.shows_behaviours:
        caption = "Traces that show each behaviour, and how far the visual ones follow the linguistic ones."
        yield "behaviours", caption, behaviour_figure(experiment, theme, width)


def write_figures(experiment: Experiment) -> list[Path]:
    """Write ``figures/NAME.png`` and ``.pdf`` in the light theme; returns the paths."""
    folder = experiment.dir / "figures"
    folder.mkdir(exist_ok=True)
    paths = []
    for chart in draw(experiment, LIGHT):
        for form, data in (("png", chart.png), ("pdf", chart.pdf)):
            paths.append(folder / f"{chart.name}.{form}")
            paths[-1].write_bytes(data)
    return paths


def loss_figure(stage: Stage, theme: Theme, width: float = WIDE) -> Figure:
    """Loss by optimizer step (paper, figure 3a)."""
    figure = Figure(figsize=(width, 3.0), layout="constrained")
    axes = figure.add_subplot(title=f"{stage.title}: loss", xlabel="Step")
    steps, losses = stage.series("loss/train")
    _curve(axes, steps, losses, theme.models[0 if stage.name == "base" else 1], "{:.3f}")
    axes.set_ylim(bottom=0)
    return figure


def dynamics_figure(stage: Stage, theme: Theme, width: float = WIDE) -> Figure:
    """Mean reward above mean response length by iteration, curriculum switches marked (paper, figure 3b)."""
    figure = Figure(figsize=(width, 4.6), layout="constrained")
    reward, length = figure.subplots(2, 1, sharex=True)
    _curve(reward, *stage.series("reward/mean"), theme.models[2], "{:.2f}")
    _curve(length, *stage.series("response/length"), theme.models[3], "{:.0f}")
    reward.set_title("RL: mean reward", pad=22)  # room for the switches' labels
    length.set_title("RL: mean response length in tokens")
    length.set_xlabel("Iteration")
    for step, before, after in switches(stage):
        for axes in (reward, length):
            axes.axvline(step, color=theme.muted, linestyle=(0, (4, 3)), linewidth=1, gid="switch")
        place = {"xy": (step, 1), "xycoords": reward.get_xaxis_transform(), "textcoords": "offset points"}
        text = f"{before:,} to {after:,} tokens"
        reward.annotate(text, **place, xytext=(0, 3), ha="center", va="bottom", fontsize=8, color=theme.muted)
    return figure


def switches(stage: Stage) -> list[tuple[int, int, int]]:
    """Where the curriculum changed: first iteration of the new limit, limit before, limit after."""
    steps, limits = stage.series("curriculum/max_tokens")
    changes = zip(steps[1:], limits, limits[1:], strict=False)
    return [(step, int(before), int(after)) for step, before, after in changes if before != after]


_BY_SOURCE = "reward/source/"


def sources(stage: Stage) -> list[str]:
    """Sources whose rewards the RL logged one by one, the first `MAX_SOURCES` of them."""
    return _sources(stage)[:MAX_SOURCES]


def _sources(stage: Stage) -> list[str]:
    keys = {key for row in stage.metrics for key in row if key.startswith(_BY_SOURCE)}
    return sorted(key.removeprefix(_BY_SOURCE) for key in keys)


def sources_figure(stage: Stage, theme: Theme, width: float = WIDE) -> Figure:
    """Reward above response length, a line for each source (paper, figure 6: perception gains, and grows no longer)."""
    figure = Figure(figsize=(width, 5.0), layout="constrained")
    parts = figure.subplots(2, 1, sharex=True)
    named = sources(stage)
    length = "RL: mean response length in tokens"
    told = ((_BY_SOURCE, "RL: mean reward by source"), ("response/length/source/", length))
    colours = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    for axes, (group, title) in zip(parts, told, strict=True):
        axes.set_title(title)
        for source, colour in zip(named, colours, strict=False):
            steps, values = stage.series(group + source)
            axes.plot(steps, moving_average(values, max(1, len(values) // 20)), color=colour, label=source)
    parts[1].set_xlabel("Iteration")
    parts[1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    lines, labels = parts[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=4 if width == WIDE else 2)
    return figure


_HEALTH = (
    ("policy/entropy", "Entropy of the policy", "{:.2f}"),
    ("critic/explained_variance", "Explained variance of the critic", "{:.2f}"),
    ("response/stopped", "Share of responses that stop", "{:.2f}"),
    ("rollout/mismatch_max", "Largest mismatch", "{:.0e}"),
)


def health_figure(stage: Stage, theme: Theme, width: float = WIDE) -> Figure:
    """What tells a healthy PPO run from a sick one, by iteration."""
    rows, columns = (2, 2) if width == WIDE else (4, 1)
    figure = Figure(figsize=(width, 2.1 * rows), layout="constrained")
    for axes, (key, title, form) in zip(figure.subplots(rows, columns, sharex=True).flat, _HEALTH, strict=True):
        steps, values = stage.series(key)
        axes.set_title(title, fontsize=9.5)
        if not values:
            axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color=theme.muted)
            continue
        _curve(axes, steps, values, theme.models[2], form, smooth=key != "rollout/mismatch_max")
        if key == "rollout/mismatch_max" and min(values) > 0:
            axes.set_yscale("log")
    return figure


def evaluated(experiment: Experiment) -> list[tuple[Stage, list[str]]]:
    """Stages that evaluated while they trained, and the keys of the accuracies in their metrics."""
    found = []
    for stage in experiment.stages.values():
        keys = {key for row in stage.metrics for key in row if key.startswith("evaluation/") and key.count("/") == 1}
        if keys:
            found.append((stage, sorted(keys)))
    return found


def evaluation_figure(asked: Sequence[tuple[Stage, list[str]]], theme: Theme, width: float = WIDE) -> Figure:
    """Accuracy by step, a row for each stage and a line for each problem set (paper, figure 4)."""
    figure = Figure(figsize=(width, 2.6 * len(asked)), layout="constrained")
    rows = figure.subplots(len(asked), 1, squeeze=False)[:, 0]
    for axes, (stage, keys) in zip(rows, asked, strict=True):
        axes.set_title(f"{stage.title}: accuracy while it trains")
        axes.set_xlabel("Iteration" if stage.name == "rl" else "Step")
        for number, key in enumerate(keys):
            steps, values = stage.series(key)
            label, colour = key.partition("/")[2], theme.models[(number + 1) % len(theme.models)]
            axes.plot([step + 1 for step in steps], values, marker="o", markersize=4, color=colour, label=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        axes.set_ylim(0, 1.02)
        axes.legend(loc="best")
    return figure


def accuracy_figure(experiment: Experiment, theme: Theme, width: float = WIDE) -> Figure:
    """Accuracy of each model on each problem set, with confidence intervals."""
    sets = experiment.sets
    figure = Figure(figsize=(width, 3.6), layout="constrained")
    axes = figure.add_subplot(title="Accuracy on held-out problems")
    scores = {model: [experiment.score(model, name) for name in sets] for model in MODELS}
    _bars(axes, theme, list(sets.values()), scores)
    axes.set_ylim(0, 1.08)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    _models_legend(figure, theme, width)
    return figure


def behaviour_figure(experiment: Experiment, theme: Theme, width: float = WIDE) -> Figure:
    """Emergence rate of each behaviour and transfer rate of each pair (the paper's figure 5), with 95 % intervals."""
    found = experiment.behaviours["checkpoints"]
    figure = Figure(figsize=(width, 7.4), layout="constrained")
    parts = figure.subplots(3, 1)
    for axes, title, behaviours in zip(parts, ("Linguistic", "Visual"), (LINGUISTIC, VISUAL), strict=False):
        rates: dict[str, list[Bar]] = {}
        for model in MODELS:
            told = found.get(model, {}).get("behaviours", {})
            shares = [told.get(behaviour.name, {}).get("emergence") for behaviour in behaviours]
            rates[model] = [share and {**share, "accuracy": share["rate"]} for share in shares]
        _bars(axes, theme, [behaviour.title.replace(" ", "\n", 1) for behaviour in behaviours], rates)
        axes.set_title(f"{title} behaviours: share of traces")
    transfer: dict[str, list[Bar]] = {}
    for model in MODELS:
        told = found.get(model, {}).get("transfer", {})
        ratios = [told.get(behaviour.name) for behaviour in LINGUISTIC]
        shown = [{**r, "accuracy": r["value"]} if r and r["value"] is not None else None for r in ratios]
        transfer[model] = [bar or ("none" if r else None) for bar, r in zip(shown, ratios, strict=True)]
    _bars(parts[2], theme, [behaviour.title.replace(" ", "\n", 1) for behaviour in LINGUISTIC], transfer)
    parts[2].set_title("Transfer: visual over linguistic")
    _models_legend(figure, theme, width)
    return figure


def _bars(axes: Axes, theme: Theme, groups: Sequence[str], scores: Mapping[str, Sequence[Bar]]) -> None:
    """A group of bars for each of ``groups``, one of them for each of `MODELS`, with intervals and numbers."""
    step = 0.82 / len(MODELS)
    for index, (model, title) in enumerate(MODELS.items()):
        places = [place + (index - (len(MODELS) - 1) / 2) * step for place in range(len(groups))]
        bars = [(at, score) for at, score in zip(places, scores[model], strict=True) if isinstance(score, dict)]
        axes.bar(
            [at for at, _ in bars],
            [score["accuracy"] for _, score in bars],
            yerr=_errors([score for _, score in bars]),
            width=step * 0.9,
            color=theme.models[index],
            label=title,
            error_kw={"ecolor": theme.ink, "elinewidth": 1, "capsize": 2, "alpha": 0.7},
        )
        for at, score in zip(places, scores[model], strict=True):
            place: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
            if isinstance(score, dict):
                axes.annotate(f"{100 * score['accuracy']:.0f}", (at, score["high"]), (0, 3), **place)
            else:
                axes.annotate(score or "not run", (at, 0.0), (0, 3), **place, rotation=90, color=theme.muted)
    axes.set_xticks(range(len(groups)), groups)
    axes.tick_params(axis="x", length=0, labelcolor=theme.ink)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.margins(y=0.15)
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))


def _models_legend(figure: Figure, theme: Theme, width: float) -> None:
    keys = [Patch(color=colour, label=title) for colour, title in zip(theme.models, MODELS.values(), strict=True)]
    columns = 4 if width == WIDE else 2
    figure.legend(handles=keys, loc="outside lower center", ncols=columns, handlelength=1, handleheight=1)


def _errors(scores: Sequence[dict[str, float]]) -> list[list[float]]:
    below = [max(0.0, score["accuracy"] - score["low"]) for score in scores]
    return [below, [max(0.0, score["high"] - score["accuracy"]) for score in scores]]


def _curve(
    axes: Axes, steps: Sequence[int], values: Sequence[float], colour: str, form: str, smooth: bool = True
) -> None:
    """Plot ``values``, faint with a strong moving average over a twentieth of the run, and name the last one."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if not values:
        return
    window = max(1, len(values) // 20) if smooth else 1
    strong = moving_average(values, window)
    if window > 1:
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.4)
    axes.plot(steps, strong, color=colour, marker="o" if len(values) == 1 else None)
    label = {"xy": (steps[-1], strong[-1]), "xytext": (5, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(form.format(strong[-1]), **label, color=colour, fontweight="bold", annotation_clip=False)
