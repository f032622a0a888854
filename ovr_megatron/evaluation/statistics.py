"""The few numbers of the reports: shares with their intervals, pass@k, means of a curve's ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Share:
    """A share of ``total`` trials, with its confidence interval ``low`` to ``high``; all in 0..1."""

    value: float
    low: float
    high: float
    total: int


def wilson(correct: float, total: int, confidence: float = 0.95) -> Share:
    r"""Share of ``correct`` out of ``total`` with Wilson's score interval.

    .. math:: \frac{p + z^2/2n \pm z \sqrt{p(1-p)/n + z^2/4n^2}}{1 + z^2/n}

    ``correct`` may be a sum of values in 0..1, such as pass rates: the interval is then on the safe side,
    because no variable in 0..1 varies more than a coin of the same mean.

    Raises:
        ValueError: ``total`` is not positive or ``correct`` lies outside 0..total.
    """
    if total < 1 or not 0 <= correct <= total:
        raise ValueError(f"{correct} of {total} is no share; give 0 <= correct <= total and at least one trial")
    p, z2 = correct / total, NormalDist().inv_cdf(0.5 + confidence / 2) ** 2
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = math.sqrt(z2 * (p * (1 - p) / total + z2 / (4 * total**2))) / (1 + z2 / total)
    return Share(p, max(0.0, centre - half), min(1.0, centre + half), total)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that ``k`` of ``samples`` answers, drawn without replacement, hold one of the ``correct`` ones.

    The unbiased estimator 1 - C(n - c, k) / C(n, k) of Chen et al. 2021 (arXiv 2107.03374, equation 1).

    Raises:
        ValueError: not 1 <= k <= samples or not 0 <= correct <= samples.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{k} of {correct} right in {samples} samples: at most {samples} of either, k from 1")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def mean_of_first(values: Sequence[float], count: int) -> float | None:
    """Mean of the first ``count`` values, or of all if there are fewer; None if there is none."""
    return _mean(values[:count])


def mean_of_last(values: Sequence[float], count: int) -> float | None:
    """Mean of the last ``count`` values, or of all if there are fewer; None if there is none."""
    return _mean(values[-count:])


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and the up to ``window - 1`` before it."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    starts = [max(0, end - window) for end in range(1, len(sums))]
    return [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, 1)]


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
