"""MinHash signatures and the near duplicates among them by locality-sensitive hashing, in numpy.

Broder 1997; Leskovec, Rajaraman, Ullman, *Mining of Massive Datasets*, chapter 3.  Signatures are one array of integers
(on disk if it is large) and buckets are runs of a sorted column, so that millions of rows need no Python object each.
"""

from __future__ import annotations

import numpy as np

from ovr_megatron.curation.text import mix, ngram_hashes

_BLOCK = 1 << 12  # shingles hashed at a time
_PAIRS = 1 << 16  # pairs of signatures compared at a time


def signature(shingles: np.ndarray, permutations: int, seed: int = 0) -> np.ndarray:
    """uint32[permutations]: for each the smallest of the multiply-shift hashes of ``shingles`` uint64[m], m > 0."""
    multipliers, offsets = _functions(permutations, seed)
    lowest = np.full(permutations, np.iinfo(np.uint32).max, np.uint32)
    for start in range(0, len(shingles), _BLOCK):
        block = shingles[None, start : start + _BLOCK] * multipliers[:, None] + offsets[:, None]
        lowest = np.minimum(lowest, (block >> np.uint64(32)).astype(np.uint32).min(axis=1))
    return lowest


def _functions(permutations: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    places = np.arange(permutations, dtype=np.uint64) + np.uint64((2 * seed + 1) << 20)
    return mix(places) | np.uint64(1), mix(places + np.uint64(1 << 19))


def near_duplicates(signatures: np.ndarray, classes: np.ndarray, bands: int, threshold: float) -> np.ndarray:
    """For each row an earlier one that stays and that it nearly equals, else -1: it stays itself.

    Args:
        signatures: uint32[n, permutations].
        classes: uint64[n]; only rows of one class are compared.
        bands: Rows that agree in all of one band's columns are compared.
        threshold: Share of equal columns, which estimates the Jaccard similarity, that makes near duplicates.
    """
    n, permutations = signatures.shape
    width = permutations // bands
    pairs = [np.zeros((0, 2), np.int64)]
    for band in range(bands):
        columns = np.ascontiguousarray(signatures[:, band * width : (band + 1) * width]).astype(np.uint64)
        pairs += _alike(signatures, mix(_row_hashes(columns) ^ classes), threshold)
    leader = np.full(n, -1, np.int64)
    for later, earlier in np.unique(np.concatenate(pairs), axis=0).tolist():  # in the order of the later row
        if leader[earlier] < 0 and leader[later] < 0:
            leader[later] = earlier
    return leader


def _row_hashes(columns: np.ndarray) -> np.ndarray:
    total = np.zeros(len(columns), np.uint64)
    for column in mix(columns).T:
        total = mix(total + column)
    return total


def _alike(signatures: np.ndarray, buckets: np.ndarray, threshold: float) -> list[np.ndarray]:
    """Pairs (later, earlier) of near duplicates, int64[p, 2].

    The rows of a bucket are compared with its first; those unlike it form a bucket of their own, and so on.
    """
    rows = np.argsort(buckets, kind="stable")  # stable: earlier rows come first
    pairs = []
    while len(rows) > 1:
        found = buckets[rows]
        starts = np.flatnonzero(np.concatenate([[True], found[1:] != found[:-1]]))
        sizes = np.diff(np.append(starts, len(rows)))
        first = np.repeat(rows[starts], sizes)
        others = np.flatnonzero(first != rows)
        alike = similar(signatures, first[others], rows[others], threshold)
        pairs.append(np.stack([rows[others[alike]], first[others[alike]]], axis=1))
        rows = rows[others[~alike]]
    return pairs


def similar(signatures: np.ndarray, left: np.ndarray, right: np.ndarray, threshold: float) -> np.ndarray:
    """bool[p]: whether the signatures of rows ``left`` [p] and ``right`` [p] agree in ``threshold`` of the columns."""
    result = np.zeros(len(left), bool)
    for start in range(0, len(left), _PAIRS):
        at = slice(start, start + _PAIRS)
        result[at] = (signatures[left[at]] == signatures[right[at]]).mean(axis=1) >= threshold
    return result


def shingles_of(hashes: np.ndarray, n: int) -> np.ndarray:
    """The different n-grams of word hashes uint64[m]; a shorter text is one n-gram, an empty one a fixed number."""
    if not len(hashes):
        return np.zeros(1, np.uint64)
    return np.unique(ngram_hashes(hashes, min(n, len(hashes))))
