"""Detect losses that stand out from those before them."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

_MIN_LOSSES = 8  # before the first judgement
_MAD_TO_STD = 1.4826  # a normal distribution's standard deviation over its median absolute deviation
_MIN_SPREAD = 1e-3  # of the median: a loss that hardly moves is no spike when it does


class SpikeWatch:
    """Judges each loss by the median and the median absolute deviation of the last ``window``.

    The deviation is scaled to a normal distribution's, and at least a thousandth of the median.
    With ``deviations`` of 0 no loss is a spike.
    """

    def __init__(self, deviations: float, window: int):
        self.deviations = deviations
        self.losses: deque[float] = deque(maxlen=window)

    def judge(self, loss: float) -> float | None:
        """Return the robust deviations of ``loss`` above the median if it is a spike; the loss enters the window."""
        spike_score = None
        if self.deviations and len(self.losses) >= min(_MIN_LOSSES, self.losses.maxlen or _MIN_LOSSES):
            median = statistics.median(self.losses)
            spread = _MAD_TO_STD * statistics.median(abs(value - median) for value in self.losses)
            score = (loss - median) / max(spread, _MIN_SPREAD * abs(median), 1e-12)
            if score > self.deviations:
                spike_score = score
        # A NaN in the window would make every later comparison false.
        if math.isfinite(loss):
            self.losses.append(loss)
        return spike_score

    def state(self) -> list[float]:
        """Return the window, as JSON."""
        return list(self.losses)

    def load(self, losses: Sequence[float]) -> None:
        """Set the window to one that `state` returned."""
        self.losses.extend(losses)
