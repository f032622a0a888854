"""MinHash signatures, and near duplicates among them by locality-sensitive hashing, in numpy.

Broder 1997; Leskovec, Rajaraman, Ullman, *Mining of Massive Datasets*, chapter 3.  Signatures are one array of integers
(which may be mapped from disk) and buckets are runs of equal values in a sorted column, so that no row needs a Python
object of its own.
"""

from __future__ import annotations

import numpy as np

from ovr_megatron.curation.text import mix, ngram_hashes

_BLOCK = 1 << 12  # shingles hashed at a time
_PAIRS = 1 << 16  # pairs of signatures compared at a time


def signature(shingles: np.ndarray, permutations: int, seed: int = 0) -> np.ndarray:
    """Return uint32[permutations]: the minimum of each multiply-shift hash over ``shingles`` uint64[m], m > 0."""
    multipliers, offsets = _hash_functions(permutations, seed)
    largest = np.iinfo(np.uint32).max
    minima = np.full(permutations, largest, np.uint32)
    for start in range(0, len(shingles), _BLOCK):
        end = start + _BLOCK
        block = shingles[None, start:end]
        products = block * multipliers[:, None]  # modulo 2**64, as multiply-shift hashing wants it
        sums = products + offsets[:, None]
        # The upper half: the low bits of a product depend on the low bits of its factors only.
        upper_bits = sums >> np.uint64(32)
        hashes = upper_bits.astype(np.uint32)
        block_minima = hashes.min(axis=1)
        minima = np.minimum(minima, block_minima)
    return minima


def _hash_functions(permutations: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return odd multipliers and offsets, uint64[permutations] each."""
    # No counter comes twice, as long as there are at most 2**19 permutations; `mix` is a bijection.
    first = np.uint64((2 * seed + 1) << 20)
    counters = np.arange(permutations, dtype=np.uint64) + first
    offset_counters = counters + np.uint64(1 << 19)
    multipliers = mix(counters) | np.uint64(1)
    offsets = mix(offset_counters)
    return multipliers, offsets


def near_duplicates(
    signatures: np.ndarray,
    classes: np.ndarray,
    bands: int,
    threshold: float,
) -> np.ndarray:
    """Return for each row the index of an earlier row that stays and that it nearly equals, or -1: it stays itself.

    Args:
        signatures: uint32[n, permutations].
        classes: uint64[n]; only rows of one class are compared.
        bands: Rows that agree in all of one band's columns are compared.
        threshold: Share of equal columns from which on two rows are near duplicates; it estimates the Jaccard
            similarity.
    """
    n, permutations = signatures.shape
    width = permutations // bands
    pairs = [np.zeros((0, 2), np.int64)]
    for band in range(bands):
        # A copy in memory: the signatures may be mapped from disk.
        start = band * width
        end = start + width
        band_columns = np.ascontiguousarray(signatures[:, start:end])
        row_hashes = _row_hashes(band_columns.astype(np.uint64))
        # Rows of other classes get other buckets, so that they are never compared.
        buckets = mix(row_hashes ^ classes)
        pairs += _similar_pairs(signatures, buckets, threshold)
    leader = np.full(n, -1, np.int64)
    all_pairs = np.concatenate(pairs)
    # In the order of the later row, so that it is settled whether a row stays before others are compared with it.
    ordered_pairs = np.unique(all_pairs, axis=0)
    for later, earlier in ordered_pairs.tolist():
        if leader[earlier] < 0 and leader[later] < 0:
            leader[later] = earlier
    return leader


def _row_hashes(columns: np.ndarray) -> np.ndarray:
    hashes = np.zeros(len(columns), np.uint64)
    for column in mix(columns).T:
        hashes = mix(hashes + column)
    return hashes


def _similar_pairs(
    signatures: np.ndarray,
    buckets: np.ndarray,
    threshold: float,
) -> list[np.ndarray]:
    """Return pairs (later, earlier) of near duplicates, int64[p, 2] each.

    The rows of a bucket are compared with its first row.  Those unlike it form a bucket of their own, and so on.
    """
    rows = np.argsort(buckets, kind="stable")  # stable: the earliest row of a bucket comes first
    pairs = []
    while len(rows) > 1:
        row_buckets = buckets[rows]
        differs_from_previous = row_buckets[1:] != row_buckets[:-1]
        is_start = np.concatenate([[True], differs_from_previous])
        starts = np.flatnonzero(is_start)
        bounds = np.append(starts, len(rows))
        sizes = np.diff(bounds)
        first = np.repeat(rows[starts], sizes)
        is_later = first != rows
        later_rows = rows[is_later]
        first_rows = first[is_later]
        same = similar(signatures, first_rows, later_rows, threshold)
        duplicates = later_rows[same]
        originals = first_rows[same]
        pairs.append(np.stack([duplicates, originals], axis=1))
        # The first row of each bucket drops out, so that the loop ends.
        rows = later_rows[~same]
    return pairs


def similar(
    signatures: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
    threshold: float,
) -> np.ndarray:
    """Return bool[p]: whether the signatures of rows ``left`` [p] and ``right`` [p] agree.

    They do where at least the share ``threshold`` of their columns is equal.
    """
    result = np.zeros(len(left), bool)
    # In blocks: a copy of both signatures of all pairs would be many times the signatures themselves.
    for start in range(0, len(left), _PAIRS):
        block = slice(start, start + _PAIRS)
        left_signatures = signatures[left[block]]
        right_signatures = signatures[right[block]]
        equal_columns = left_signatures == right_signatures
        shares = equal_columns.mean(axis=1)
        result[block] = shares >= threshold
    return result


def shingles_of(hashes: np.ndarray, n: int) -> np.ndarray:
    """Return the distinct n-grams of word hashes uint64[m].

    A text of fewer than n words is one n-gram; an empty text has the single shingle 0.
    """
    if not len(hashes):
        return np.zeros(1, np.uint64)
    length = min(n, len(hashes))
    return np.unique(ngram_hashes(hashes, length))
