"""Draw a metric by step: faint values, a strong moving average, and its last value beside it."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ovr_megatron.evaluation.statistics import moving_average


def draw_curve(
    axes: Axes,
    steps: Sequence[int],
    values: Sequence[float],
    colour: str,
    form: str,
    smooth: bool = True,
) -> None:
    """Plot ``values``, faint, with a strong moving average over a twentieth of the run, and label the last mean."""
    use_whole_steps(axes)
    if not values:
        return
    window = average_window(values) if smooth else 1
    strong = moving_average(values, window)
    if window > 1:
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.4)
    marker = "o" if len(values) == 1 else None  # a line through a single point would not be seen
    axes.plot(steps, strong, color=colour, marker=marker)
    axes.annotate(
        form.format(strong[-1]),
        xy=(steps[-1], strong[-1]),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        color=colour,
        fontweight="bold",
        annotation_clip=False,  # the label lies beside the axes, where Matplotlib would clip it
    )


def average_window(values: Sequence[float]) -> int:
    """Return the length of a moving average: a twentieth of the run."""
    return max(1, len(values) // 20)


def use_whole_steps(axes: Axes) -> None:
    """Put the ticks of the x axis at whole steps, a round number of them apart."""
    locator = MaxNLocator(integer=True, steps=[1, 2, 5, 10])
    axes.xaxis.set_major_locator(locator)
