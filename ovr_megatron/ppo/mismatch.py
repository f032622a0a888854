"""Measure how far log-probabilities of trainer and rollout engine differ: mean, quantile and maximum, by group.

Vision features are where two implementations in bfloat16 part first, so a mean over all tokens hides what images add.
Tokens that older weights drew differ by what the policy has learned since.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ovr_megatron.data.samples import Sample

MODALITIES = ("text", "image", "video")
# Of a token, in iterations; the last group has all that are as old or older.
STALENESS = tuple(f"staleness_{age}" for age in range(9))
QUANTILE = 0.99
# Bins of equal width in the logarithm, from 1e-9 to 1e3: an edge lies 10 % above the one before.
_BINS_PER_DECADE = 24
_FIRST_DECADE = -9
_DECADES = 12
_BINS = _BINS_PER_DECADE * _DECADES


def modality(sample: Sample) -> int:
    """Return the index in `MODALITIES` of a prompt: video where it has one, else image where it has one, else text."""
    name = "text"
    if sample.videos:
        name = "video"
    elif len(sample.grid_thw):
        name = "image"
    return MODALITIES.index(name)


def token_modalities(samples: Sequence[Sample], lengths: Sequence[int]) -> list[np.ndarray]:
    """Return the modality of each response's prompt, for each of its tokens [n]."""
    arrays = []
    for sample, length in zip(samples, lengths, strict=True):
        arrays.append(np.full(length, modality(sample)))
    return arrays


class Mismatch:
    """Differences |log p(trainer) - log p(rollout)| over the tokens of some packs, by modality and by staleness.

    Args:
        by_staleness: whether tokens are also told apart by staleness; the same on all ranks.
    """

    def __init__(self, by_staleness: bool = False) -> None:
        self._by_modality = _Histograms(MODALITIES)
        self._by_staleness = _Histograms(STALENESS) if by_staleness else None

    def add(self, difference: Tensor, modalities: Tensor, staleness: Tensor | None = None) -> None:
        """Count the absolute differences [n] of tokens of these ``modalities`` (indices, [n]) and ``staleness`` [n]."""
        self._by_modality.add(difference, modalities)
        if self._by_staleness is not None:
            assert staleness is not None
            self._by_staleness.add(difference, staleness.clamp(0, len(STALENESS) - 1))

    def metrics(self) -> dict[str, float]:
        """Return ``rollout/mismatch_*`` over all ranks; of several groups, of each as well.  A collective.

        Ranks of a tensor-parallel group count the same tokens, all equally often: no mean and no quantile changes.
        """
        metrics = self._by_modality.metrics()
        if self._by_staleness is not None:
            metrics |= self._by_staleness.metrics()  # those of all tokens are the same
        return metrics


class _Histograms:
    """Histograms of differences, one for each group of tokens.

    All tensors stay on the device of the scores, which is never waited for, until `metrics`.

    Args:
        names: of the groups.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._start(torch.zeros(0))
        self._is_empty = True

    def _start(self, like: Tensor) -> None:
        """Begin with no tokens, on the device of ``like``."""
        count = len(self.names)
        self._counts = like.new_zeros(count * _BINS, dtype=torch.int64)
        # In float64, as many small differences are added up.
        self._sums = like.new_zeros(count, dtype=torch.float64)
        self._largest = like.new_zeros(count, dtype=torch.float64)

    def add(self, difference: Tensor, groups: Tensor) -> None:
        """Count the absolute differences [n] of tokens of these ``groups`` (indices, [n])."""
        if self._is_empty:
            self._start(difference)
            self._is_empty = False
        difference = difference.double()
        groups = groups.long()
        bins = (difference.log10() - _FIRST_DECADE) * _BINS_PER_DECADE
        # A difference of 0 has the logarithm -inf and falls into the first bin; NaN counts as the worst.
        bins = bins.nan_to_num(_BINS - 1).clamp(0, _BINS - 1).long()
        cells = groups * _BINS + bins
        self._counts = self._counts.scatter_add(0, cells, torch.ones_like(bins))
        self._sums = self._sums.scatter_add(0, groups, difference)
        self._largest = self._largest.scatter_reduce(0, groups, difference, "amax")

    def metrics(self) -> dict[str, float]:
        """Return ``rollout/mismatch_*`` over all ranks; of several groups, of each as well.  A collective."""
        counts = _reduce(self._counts, dist.ReduceOp.SUM)
        sums = _reduce(self._sums, dist.ReduceOp.SUM)
        largest = _reduce(self._largest, dist.ReduceOp.MAX)
        table = counts.view(len(self.names), _BINS)
        metrics = _describe(table.sum(0), sums.sum(), largest.max())
        statistics = {}
        for i, name in enumerate(self.names):
            if table[i].any():
                statistics[name] = _describe(table[i], sums[i], largest[i])
        # A single group has the statistics of all tokens, which are there already.
        if len(statistics) > 1:
            for name, values in statistics.items():
                for key, value in values.items():
                    metrics[f"{key}/{name}"] = value
        return metrics


def _reduce(values: Tensor, operation: dist.ReduceOp) -> Tensor:
    """Return ``values`` reduced over all ranks, on the host.  A collective."""
    # A copy: a later call must find what this rank alone has counted.
    reduced = values.cpu().clone()
    dist.all_reduce(reduced, operation)
    return reduced


def _describe(counts: Tensor, total: Tensor, largest: Tensor) -> dict[str, float]:
    """Return mean, quantile (the upper edge of its bin, at most 10 % too high) and maximum of a histogram [bins].

    Args:
        counts: tokens in each bin.
        total: sum of the differences, a scalar.
        largest: the largest difference, a scalar.
    """
    tokens = int(counts.sum())
    maximum = float(largest)
    reaches_quantile = counts.cumsum(0) >= QUANTILE * tokens
    quantile_bin = int(reaches_quantile.long().argmax())  # the first of them
    upper_edge = 10.0 ** (_FIRST_DECADE + (quantile_bin + 1) / _BINS_PER_DECADE)
    return {
        "rollout/mismatch_mean": float(total) / max(tokens, 1),
        "rollout/mismatch_p99": min(upper_edge, maximum),
        "rollout/mismatch_max": maximum,
    }
