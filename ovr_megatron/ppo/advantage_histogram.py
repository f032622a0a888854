"""Distribution of the advantages over the tokens of all ranks, as a histogram and as its quantiles."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from ovr_megatron.ppo.advantages import Ragged, mean_and_std, moments
from ovr_megatron.ppo.experience import sum_over_dp
from ovr_megatron.ppo.sources import ResponseSources
from ovr_megatron.runtime.layout import Layout
from ovr_megatron.runtime.trackers.protocol import Histogram

BINS = 1000
SHOWN_BINS = 50  # of a histogram that a tracker shows
QUANTILES = (10, 50, 90)


def histogram_over_ranks(arrays: Ragged, layout: Layout) -> Histogram | None:
    """Return the histogram of the values of all ranks, or None if there are none.  A collective.

    Values that are not finite are left out: the gradients that come of them are refused.

    Args:
        arrays: float64 [n] of each of this rank's responses; the ranks of a replica have the same.
        layout: whose data-parallel ranks have different responses.
    """
    values = np.concatenate([np.zeros(0), *arrays])
    values = values[np.isfinite(values)]
    # The negated minimum beside the maximum, so that one collective gives both.
    bounds = torch.tensor([-values.min(initial=np.inf), values.max(initial=-np.inf)], dtype=torch.float64)
    dist.all_reduce(bounds, dist.ReduceOp.MAX)
    smallest, largest = -float(bounds[0]), float(bounds[1])
    if smallest > largest:
        return None
    edges = np.linspace(smallest, largest, BINS + 1)
    # All ranks have the same edges, so that counts of bins can be added.
    local_counts, _ = np.histogram(values, edges)
    local_moments = moments([values])
    # One collective for both.
    sums = sum_over_dp(np.concatenate([local_counts, local_moments]), layout)
    counts = sums[:BINS].round().astype(np.int64)
    return Histogram(edges, counts, float(sums[-2]), float(sums[-1]))


def describe_histogram(histogram: Histogram, suffix: str = "") -> dict[str, float]:
    """Return extremes, quantiles and standard deviation as ``advantage/NAME`` with ``suffix`` behind it."""
    _, std = mean_and_std(np.array([histogram.counts.sum(), histogram.total, histogram.squares]))
    metrics = {
        f"advantage/min{suffix}": float(histogram.edges[0]),
        f"advantage/max{suffix}": float(histogram.edges[-1]),
        f"advantage/std{suffix}": std,
    }
    for percent in QUANTILES:
        metrics[f"advantage/p{percent}{suffix}"] = histogram.quantile(percent)
    return metrics


def advantage_metrics(
    advantages: Ragged,
    sources: ResponseSources,
    layout: Layout,
) -> tuple[dict[str, float], Histogram | None]:
    """Return the distribution of the advantages as metrics, of all tokens and by source, and a histogram to show.

    A collective.

    Args:
        advantages: float64 [n] of each of this rank's responses.
        sources: of these responses.
        layout: of the policy.
    """
    histogram = histogram_over_ranks(advantages, layout)
    if histogram is None:
        return {}, None
    metrics = describe_histogram(histogram)
    # The names are the same on all ranks, which so enter the same collectives.
    for i, name in enumerate(sources.names):
        of_source = histogram_over_ranks(sources.of(advantages, i), layout)
        if of_source is not None:
            metrics |= describe_histogram(of_source, f"/source/{name}")
    return metrics, histogram.merged(SHOWN_BINS)
