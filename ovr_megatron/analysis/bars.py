"""Draw the figures of bars: accuracy by problem set, and rates of the cognitive behaviours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from ovr_megatron.analysis.experiment import MODELS, Experiment
from ovr_megatron.analysis.themes import WIDE, Theme, legend_columns
from ovr_megatron.evaluation.behaviours import LINGUISTIC, VISUAL, Behaviour


@dataclass(frozen=True)
class Bar:
    """A share with its 95 % interval."""

    value: float
    low: float
    high: float


BarOrWord = Bar | str | None
"""A bar; or a word to write instead of one, "not run" for None."""


def draw_accuracy(experiment: Experiment, theme: Theme, width: float = WIDE) -> Figure:
    """Draw the accuracy of each model on each problem set, with confidence intervals."""
    sets = experiment.sets
    figure = Figure(figsize=(width, 3.6), layout="constrained")
    axes = figure.add_subplot(title="Accuracy on held-out problems")
    bars: dict[str, list[BarOrWord]] = {}
    for model in MODELS:
        bars[model] = [_accuracy_bar(experiment, model, name) for name in sets]
    _draw_bars(axes, theme, list(sets.values()), bars)
    axes.set_ylim(0, 1.08)  # room for the numbers above the bars
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    _draw_models_legend(figure, theme, width)
    return figure


def _accuracy_bar(experiment: Experiment, model: str, problem_set: str) -> Bar | None:
    score = experiment.score(model, problem_set)
    if not score:
        return None
    return Bar(score["accuracy"], score["low"], score["high"])


def draw_behaviours(experiment: Experiment, theme: Theme, width: float = WIDE) -> Figure:
    """Draw the emergence rate of each behaviour and the transfer rate of each pair, with 95 % intervals.

    This is the paper's figure 5.
    """
    figure = Figure(figsize=(width, 7.4), layout="constrained")
    linguistic_axes, visual_axes, transfer_axes = figure.subplots(3, 1)
    panels = (
        (linguistic_axes, "Linguistic", LINGUISTIC),
        (visual_axes, "Visual", VISUAL),
    )
    for axes, title, behaviours in panels:
        rates: dict[str, list[BarOrWord]] = {}
        for model in MODELS:
            rates[model] = [_emergence_bar(experiment, model, behaviour) for behaviour in behaviours]
        _draw_bars(axes, theme, _titles(behaviours), rates)
        axes.set_title(f"{title} behaviours: share of traces")
    ratios: dict[str, list[BarOrWord]] = {}
    for model in MODELS:
        ratios[model] = [_transfer_bar(experiment, model, behaviour) for behaviour in LINGUISTIC]
    _draw_bars(transfer_axes, theme, _titles(LINGUISTIC), ratios)
    transfer_axes.set_title("Transfer: visual over linguistic")
    _draw_models_legend(figure, theme, width)
    return figure


def _titles(behaviours: Sequence[Behaviour]) -> list[str]:
    """Return the titles, broken after their first word."""
    return [behaviour.title.replace(" ", "\n", 1) for behaviour in behaviours]


def _emergence_bar(experiment: Experiment, model: str, behaviour: Behaviour) -> Bar | None:
    share = experiment.emergence(model, behaviour.name)
    if not share:
        return None
    return Bar(share["rate"], share["low"], share["high"])


def _transfer_bar(experiment: Experiment, model: str, behaviour: Behaviour) -> BarOrWord:
    """Return a bar; "none" where the linguistic behaviour never occurred, so that there is no ratio."""
    rate = experiment.transfer_rate(model, behaviour.name)
    if not rate:
        return None
    value = rate["value"]
    low = rate["low"]
    high = rate["high"]
    if value is None or low is None or high is None:
        return "none"
    return Bar(value, low, high)


def _draw_bars(axes: Axes, theme: Theme, groups: Sequence[str], bars: Mapping[str, Sequence[BarOrWord]]) -> None:
    """Draw a group of bars for each of ``groups``, with a bar for each of `MODELS`, its interval and its value."""
    step = 0.82 / len(MODELS)
    middle = (len(MODELS) - 1) / 2
    error_style = {
        "ecolor": theme.ink,
        "elinewidth": 1,
        "capsize": 2,
        "alpha": 0.7,
    }
    for index, (model, title) in enumerate(MODELS.items()):
        offset = (index - middle) * step
        positions = [group + offset for group in range(len(groups))]
        # A group without a value has a word in the place of its bar.
        values: dict[float, Bar] = {}
        for x, bar in zip(positions, bars[model], strict=True):
            if isinstance(bar, Bar):
                values[x] = bar
        heights = [bar.value for bar in values.values()]
        axes.bar(
            list(values),
            heights,
            yerr=_errors(list(values.values())),
            width=step * 0.9,
            color=theme.models[index],
            label=title,
            error_kw=error_style,
        )
        for x, bar in zip(positions, bars[model], strict=True):
            _label_bar(axes, theme, x, bar)
    axes.set_xticks(range(len(groups)), groups)
    axes.tick_params(axis="x", length=0, labelcolor=theme.ink)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.margins(y=0.15)
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))


def _label_bar(axes: Axes, theme: Theme, x: float, bar: BarOrWord) -> None:
    """Write a bar's percentage above its interval, or the word in its place."""
    style: dict[str, object] = {
        "xytext": (0, 3),
        "textcoords": "offset points",
        "ha": "center",
        "fontsize": 8,
    }
    if isinstance(bar, Bar):
        percentage = 100 * bar.value
        axes.annotate(f"{percentage:.0f}", (x, bar.high), **style)
    else:
        word = bar or "not run"
        axes.annotate(word, (x, 0.0), **style, rotation=90, color=theme.muted)


def _draw_models_legend(figure: Figure, theme: Theme, width: float) -> None:
    # Patches instead of the bars: a model without any bar keeps its colour in the legend.
    keys = []
    for colour, title in zip(theme.models, MODELS.values(), strict=True):
        keys.append(Patch(color=colour, label=title))
    figure.legend(
        handles=keys,
        loc="outside lower center",
        ncols=legend_columns(width),
        handlelength=1,
        handleheight=1,
    )


def _errors(bars: Sequence[Bar]) -> list[list[float]]:
    """Return the lengths of the error bars below and above the values."""
    # A value may lie just outside of its interval, by rounding; Matplotlib refuses negative lengths.
    below = []
    above = []
    for bar in bars:
        below.append(max(0.0, bar.value - bar.low))
        above.append(max(0.0, bar.high - bar.value))
    return [below, above]
