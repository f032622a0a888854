"""Compute the statistics of the reports: shares with intervals, pass@k, means of the ends of a curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Share:
    """A share ``value`` of ``total`` trials, with its confidence interval ``low`` to ``high``; all three in 0..1."""

    value: float
    low: float
    high: float
    total: int


def wilson(correct: float, total: int, confidence: float = 0.95) -> Share:
    r"""Return the share of ``correct`` in ``total`` with Wilson's score interval.

    .. math:: \frac{p + z^2/2n \pm z \sqrt{p(1-p)/n + z^2/4n^2}}{1 + z^2/n}

    ``correct`` may be a sum of values in 0..1, such as pass rates.  The interval is then conservative: of all variables
    in 0..1 with the same mean, a Bernoulli variable has the largest variance.

    Raises:
        ValueError: ``total`` is not positive or ``correct`` lies outside 0..total.
    """
    if total < 1 or not 0 <= correct <= total:
        raise ValueError(f"{correct} of {total} is no share; give 0 <= correct <= total and at least one trial")
    p = correct / total
    z2 = NormalDist().inv_cdf(0.5 + confidence / 2) ** 2
    denominator = 1 + z2 / total
    centre = (p + z2 / (2 * total)) / denominator
    variance = p * (1 - p) / total + z2 / (4 * total**2)
    half_width = math.sqrt(z2 * variance) / denominator
    # Rounding can put the ends just outside 0..1 where all trials agree.
    return Share(p, max(0.0, centre - half_width), min(1.0, centre + half_width), total)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Return the chance that ``k`` of ``samples`` answers, drawn without replacement, include a correct one.

    This is the unbiased estimator 1 - C(n - c, k) / C(n, k) of Chen et al. 2021 (arXiv 2107.03374, equation 1).

    Raises:
        ValueError: not 1 <= k <= samples or not 0 <= correct <= samples.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{k} of {correct} right in {samples} samples: at most {samples} of either, k from 1")
    draws_without_correct = math.comb(samples - correct, k)
    return 1.0 - draws_without_correct / math.comb(samples, k)


def mean_of_first(values: Sequence[float], count: int) -> float | None:
    """Return the mean of the first ``count`` values, or of all if there are fewer; None if there are none."""
    return _mean(values[:count])


def mean_of_last(values: Sequence[float], count: int) -> float | None:
    """Return the mean of the last ``count`` values, or of all if there are fewer; None if there are none."""
    return _mean(values[-count:])


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Return for each value the mean of it and of up to ``window - 1`` values before it."""
    sums = [0.0]  # of the first values, one more at each index
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for end in range(1, len(sums)):
        start = max(0, end - window)
        means.append((sums[end] - sums[start]) / (end - start))
    return means


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
