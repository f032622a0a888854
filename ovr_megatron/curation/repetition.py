"""Repeatness of a text, the measure that Open-Reasoner-Zero logs (``playground/orz_7b_ppo.py``, "avg_repeat_score").

A text of n characters has n(n+1)/2 substrings; the repeatness is the share of those that occur further to the left as
well: 2 / (n(n+1)) times the sum of the longest common prefixes of neighbours in the suffix array.
"""

from __future__ import annotations

import numpy as np


def repeatness(text: str) -> float:
    """Return the share of repeated substrings, 0 (every one is new) to nearly 1 ("aaaa..."); O(n log^2 n) in numpy."""
    symbols = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    n = len(symbols)
    if n <= 1:
        return 0.0
    return 2.0 * common_prefixes(symbols) / (n * (n + 1))


def common_prefixes(symbols: np.ndarray) -> int:
    """Sum the longest common prefixes of neighbours in the suffix array of ``symbols`` [n].

    Prefix doubling (Manber and Myers 1990): ``ranks[k][i]`` is the rank of the suffix at i by its first 2**k symbols,
    and k rises until all ranks differ.  The common prefix of two neighbours is then the sum of the powers of two at
    which their ranks agree, the longest first.
    """
    n = len(symbols)
    ranks = [np.unique(symbols, return_inverse=True)[1].astype(np.int64)]
    order = np.argsort(ranks[0], kind="stable")
    while ranks[-1].max() < n - 1 and 1 << (len(ranks) - 1) < n:
        order, doubled = _doubled_ranks(ranks[-1], 1 << (len(ranks) - 1))
        ranks.append(doubled)
    left = order[:-1].copy()
    right = order[1:].copy()
    total = 0
    for k in range(len(ranks) - 1, -1, -1):
        step = 1 << k
        fits = np.maximum(left, right) + step <= n  # a prefix may not run past the end of the text
        same = np.zeros(len(left), bool)
        same[fits] = ranks[k][left[fits]] == ranks[k][right[fits]]
        total += step * int(same.sum())
        left[same] += step
        right[same] += step
    return total


def _doubled_ranks(ranks: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the order of the suffixes by their first 2 * ``step`` symbols and their ranks, int64[n] each.

    ``ranks`` [n] are those by the first ``step`` symbols.
    """
    n = len(ranks)
    second_half = np.zeros(n, np.int64)  # 0: the text has ended
    second_half[:-step] = ranks[step:] + 1
    pairs = ranks * (n + 1) + second_half
    order = np.argsort(pairs, kind="stable")
    ordered = pairs[order]
    doubled = np.empty(n, np.int64)
    doubled[order] = np.concatenate([[0], np.cumsum(ordered[1:] != ordered[:-1])])
    return order, doubled
