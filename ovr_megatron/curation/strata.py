"""Strata by source and difficulty, and weights that lower the share of large strata and raise that of small ones.

The paper stratifies and reweights without figures.  The rule here is that of multilingual pre-training (Conneau and
Lample 2019, section 3.1): a stratum of n rows is drawn in proportion to n**power.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter

import numpy as np

from ovr_megatron.curation.settings import WeighConfig
from ovr_megatron.curation.stage import PrepareStage, Work
from ovr_megatron.curation.text import prompt_text, response_text
from ovr_megatron.data.row_json import RowJson

OVER = "over stratify.max_rows"
_MEASURES = ("difficulty", "loss", "length")


def measures(row: RowJson) -> tuple[float, float, float]:
    """Return difficulty, proxy loss (NaN where the row has none) and length in characters of a row."""
    text = response_text(row) or prompt_text(row)
    difficulty = _number(row.get("difficulty"))
    loss = _number(row.get("loss"))
    return difficulty, loss, float(len(text))


def _number(value: float | None) -> float:
    if value is None:
        return float("nan")
    return float(value)


def run_stratify(work: Work) -> None:
    """Give every row its ``stratum``; of a stratum with too many rows keep a sample by hash."""
    config = work.config.stratify
    values = np.zeros((work.count, len(_MEASURES)))
    draws = np.zeros(work.count)
    names: list[str] = []  # the source of each row
    for index, mapped in enumerate(work.map(measures)):
        values[index] = mapped.result
        draws[index] = _draw(mapped.line, work.config.seed)
        names.append(sys.intern(mapped.source))
    # sources: int64[n], the index into labels of each row's source.
    labels, sources = np.unique(np.array(names, dtype=object), return_inverse=True)
    bins = np.zeros(work.count, np.int64)
    measure_of_source: dict[str, str] = {}
    work.extra["measure"] = measure_of_source
    for source, name in enumerate(labels):
        members = np.flatnonzero(sources == source)
        source_values = values[members]
        measure: str = config.measure
        if measure == "auto":
            measure = _first_complete(source_values)
        measure_of_source[name] = measure
        column = _MEASURES.index(measure)
        bins[members] = equal_bins(source_values[:, column], config.bins)
    strata = sources * config.bins + bins  # an integer for each pair of source and bin
    over = np.zeros(work.count, bool)
    if config.max_rows:
        ranks = _rank_within(strata, draws)
        over = ranks >= config.max_rows
    for index, line in enumerate(work.lines()):
        name = names[index]
        if over[index]:
            work.drop(line, name, OVER)
            continue
        row_stratum = f"{name}/d{bins[index]}"
        work.keep(line, name, stratum=row_stratum)


def _draw(line: str, seed: int) -> float:
    """Return a number in [0, 1) from the hash of a row: the sample does not depend on the row's position."""
    seeded_line = f"{seed}\0{line}"
    digest = hashlib.blake2b(seeded_line.encode(), digest_size=7).digest()
    # 7 bytes are 56 bits.
    return int.from_bytes(digest, "big") / 2**56


def _first_complete(values: np.ndarray) -> str:
    """Return the first measure that all rows of ``values`` [n, measures] have."""
    is_complete = ~np.isnan(values).any(axis=0)
    # Every row has a length, so that there is a complete measure; `argmax` returns the first.
    return _MEASURES[int(np.argmax(is_complete))]


def equal_bins(values: np.ndarray, count: int) -> np.ndarray:
    """Return int64[n]: the bin of each of ``values`` [n], of ``count`` bins of about equal size.

    Equal values share a bin.  Bin 0 holds the smallest values, and unknown ones (NaN).
    """
    unknown = np.isnan(values)
    finite = values[~unknown]
    if not len(finite):
        return np.zeros(len(values), np.int64)
    levels = np.arange(1, count) / count
    bounds = np.quantile(finite, levels)
    bins = np.searchsorted(bounds, values, side="left")
    return np.where(unknown, 0, bins)


def _rank_within(groups: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return int64[n]: the rank of each row within its group, by ascending ``key`` [n]."""
    order = np.lexsort((key, groups))
    sorted_groups = groups[order]
    differs_from_previous = sorted_groups[1:] != sorted_groups[:-1]
    is_start = np.concatenate([[True], differs_from_previous])
    starts = np.flatnonzero(is_start)
    bounds = np.append(starts, len(order))
    sizes = np.diff(bounds)
    positions = np.arange(len(order))
    ranks = np.empty(len(groups), np.int64)
    ranks[order] = positions - np.repeat(starts, sizes)
    return ranks


def group_weights(sizes: np.ndarray, config: WeighConfig) -> np.ndarray:
    """Return float64[g]: the weight of a row in each group of ``sizes`` int64[g] rows; the mean over all rows is 1.

    Weights are proportional to sizes ** (power - 1) and clipped to ``min_weight`` and ``max_weight``.  The factor of
    proportionality is the one that makes the mean 1.  Bisection finds it, since the mean rises with the factor.
    """
    exponent = config.power - 1
    unclipped = sizes.astype(float) ** exponent
    share = sizes / sizes.sum()

    def clipped_weights(factor: float) -> np.ndarray:
        return np.clip(factor * unclipped, config.min_weight, config.max_weight)

    low = 0.0
    high = config.max_weight / unclipped.min()
    for _ in range(200):  # more halvings than a float has bits: low and high end as neighbours
        factor = (low + high) / 2
        mean = (clipped_weights(factor) * share).sum()
        if mean < 1:
            low = factor
        else:
            high = factor
    return clipped_weights(high)


def run_weigh(work: Work) -> None:
    """Give every row the ``weight`` of its stratum."""
    sizes: Counter[str] = Counter()
    # The rows are read twice: weights are known only after all rows have been counted.
    for mapped in work.map(stratum):
        sizes[mapped.result] += 1
    names = sorted(sizes)
    counts = np.array([sizes[name] for name in names])
    row_weights = group_weights(counts, work.config.weigh)
    weights = dict(zip(names, row_weights.tolist(), strict=True))
    total = sum(weights[name] * sizes[name] for name in names)  # differs from the number of rows by rounding only
    strata = {}
    for name in names:
        rows = sizes[name]
        weight = weights[name]
        share_before = rows / counts.sum()
        share_after = weight * rows / total
        strata[name] = {
            "rows": rows,
            "weight": round(weight, 6),
            "share_before": round(share_before, 6),
            "share_after": round(share_after, 6),
        }
    work.extra["strata"] = strata
    for row in work.rows():
        source = row.get("source", "")
        weight = weights[row["stratum"]]
        work.keep(row, source, weight=round(weight, 6))


def stratum(row: RowJson) -> str:
    """Return the stratum of a row."""
    return row["stratum"]


STRATIFY = PrepareStage("stratify", run_stratify, lambda config: config.stratify)
WEIGH = PrepareStage("weigh", run_weigh, lambda config: config.weigh)
