"""Losses that stand out from those before them."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

_LEAST = 8  # losses before the first judgement
_NORMAL = 1.4826  # a normal distribution's standard deviation over its median absolute deviation
_FLOOR = 1e-3  # of the median: a loss that hardly moves is no spike when it does


class SpikeWatch:
    """Judges each loss by the median and the median absolute deviation of the last ``window``.

    The deviation is scaled to a normal distribution's, and at least a thousandth of the median.
    ``deviations`` of 0 judge nothing.
    """

    def __init__(self, deviations: float, window: int):
        self.deviations = deviations
        self.losses: deque[float] = deque(maxlen=window)

    def judge(self, loss: float) -> float | None:
        """Robust deviations of ``loss`` above the median if it is a spike; the loss enters the window."""
        found = None
        if self.deviations and len(self.losses) >= min(_LEAST, self.losses.maxlen or _LEAST):
            median = statistics.median(self.losses)
            spread = _NORMAL * statistics.median(abs(value - median) for value in self.losses)
            score = (loss - median) / max(spread, _FLOOR * abs(median), 1e-12)
            found = score if score > self.deviations else None
        if math.isfinite(loss):
            self.losses.append(loss)
        return found

    def state(self) -> list[float]:
        """The window, as JSON."""
        return list(self.losses)

    def load(self, losses: Sequence[float]) -> None:
        """Go on from a window."""
        self.losses.extend(losses)
