"""Strata by source and difficulty, and weights that pull big groups down and rare ones up.

The paper stratifies and reweights without figures; the rule here is that of multilingual pre-training (Conneau and
Lample 2019, section 3.1): a group of n rows is drawn in proportion to n**power.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from typing import Any

import numpy as np

from ovr_megatron.curation.settings import WeighConfig
from ovr_megatron.curation.stage import PrepareStage, Work
from ovr_megatron.curation.text import prompt_text, response_text

OVER = "over stratify.max_rows"
_MEASURES = ("difficulty", "loss", "length")


def measures(row: dict[str, Any]) -> tuple[float, float, float]:
    """Difficulty, proxy's loss (NaN where there is none) and length in characters of a row."""
    length = len(response_text(row) or prompt_text(row))
    return _number(row.get("difficulty")), _number(row.get("loss")), float(length)


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def run_stratify(work: Work) -> None:
    """Give every row its ``stratum``; where there are too many of one, a sample by hash stays."""
    config = work.config.stratify
    values = np.zeros((work.count, 3))
    drawn = np.zeros(work.count)
    names: list[str] = []
    for index, mapped in enumerate(work.map(measures)):
        values[index] = mapped.result
        drawn[index] = _draw(mapped.line, work.config.seed)
        names.append(sys.intern(mapped.source))
    labels, sources = np.unique(np.array(names, dtype=object), return_inverse=True)
    bins = np.zeros(work.count, np.int64)
    work.extra["measure"] = chosen = {}
    for number, name in enumerate(labels):
        members = np.flatnonzero(sources == number)
        measure = config.measure if config.measure != "auto" else _first_known(values[members])
        chosen[name] = measure
        bins[members] = equal_bins(values[members, _MEASURES.index(measure)], config.bins)
    rank = _rank_within(sources * config.bins + bins, drawn)
    over = (rank >= config.max_rows) if config.max_rows else np.zeros(work.count, bool)
    for index, line in enumerate(work.lines()):
        if over[index]:
            work.drop(line, names[index], OVER)
        else:
            work.keep(line, names[index], stratum=f"{names[index]}/d{bins[index]}")


def _draw(line: str, seed: int) -> float:
    digest = hashlib.blake2b(f"{seed}\0{line}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big") / 2**56


def _first_known(values: np.ndarray) -> str:
    return next(name for name, column in zip(_MEASURES, values.T, strict=True) if not np.isnan(column).any())


def equal_bins(values: np.ndarray, count: int) -> np.ndarray:
    """int64[n]: which of ``count`` bins of about equal size each of ``values`` [n] lies in; equal values together.

    Bin 0 holds the smallest.  Unknown values (NaN) go to bin 0.
    """
    known = values[~np.isnan(values)]
    if not len(known):
        return np.zeros(len(values), np.int64)
    bounds = np.quantile(known, np.arange(1, count) / count)
    return np.where(np.isnan(values), 0, np.searchsorted(bounds, values, side="left"))


def _rank_within(groups: np.ndarray, key: np.ndarray) -> np.ndarray:
    """int64[n]: the place of each row in its group, by ``key``."""
    order = np.lexsort((key, groups))
    ranked = groups[order]
    starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
    sizes = np.diff(np.append(starts, len(ranked)))
    place = np.arange(len(ranked)) - np.repeat(starts, sizes)
    result = np.empty(len(groups), np.int64)
    result[order] = place
    return result


def group_weights(sizes: np.ndarray, config: WeighConfig) -> np.ndarray:
    """float64[g]: the weight of a row in each group of ``sizes`` int64[g] rows; the mean over all rows is 1.

    Weights in proportion to sizes ** (power - 1), cut to ``min_weight`` and ``max_weight``; the factor is the one that
    makes the mean 1, found by bisection, since the mean of cut weights rises with it.
    """
    wanted = sizes.astype(float) ** (config.power - 1)
    share = sizes / sizes.sum()
    low, high = 0.0, config.max_weight / wanted.min()
    for _ in range(200):
        factor = (low + high) / 2
        mean = (np.clip(factor * wanted, config.min_weight, config.max_weight) * share).sum()
        low, high = (factor, high) if mean < 1 else (low, factor)
    return np.clip(high * wanted, config.min_weight, config.max_weight)


def run_weigh(work: Work) -> None:
    """Give every row the ``weight`` of its stratum."""
    sizes: Counter[str] = Counter()
    for mapped in work.map(stratum):
        sizes[mapped.result] += 1
    names = sorted(sizes)
    counts = np.array([sizes[name] for name in names])
    weights = dict(zip(names, group_weights(counts, work.config.weigh).tolist(), strict=True))
    total = sum(weights[name] * sizes[name] for name in names)
    work.extra["strata"] = {
        name: {
            "rows": sizes[name],
            "weight": round(weights[name], 6),
            "share_before": round(sizes[name] / counts.sum(), 6),
            "share_after": round(weights[name] * sizes[name] / total, 6),
        }
        for name in names
    }
    for row in work.rows():
        work.keep(row, row.get("source", ""), weight=round(weights[row["stratum"]], 6))


def stratum(row: dict[str, Any]) -> str:
    """The stratum of a row."""
    return row["stratum"]


STRATIFY = PrepareStage("stratify", run_stratify, lambda config: config.stratify)
WEIGH = PrepareStage("weigh", run_weigh, lambda config: config.weigh)
