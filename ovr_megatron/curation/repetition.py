"""Repeatness of a text, the measure that Open-Reasoner-Zero logs (``playground/orz_7b_ppo.py``, "avg_repeat_score").

A text of n characters has n(n+1)/2 substrings; the repeatness is the share of those that occur further to the left as
well: 2 / (n(n+1)) times the sum of the longest common prefixes of neighbours in the suffix array.
"""

from __future__ import annotations

import numpy as np


def repeatness(text: str) -> float:
    """Share of repeated substrings, 0 (every substring is new) to nearly 1 ("aaaa..."); O(n log^2 n) in numpy."""
    symbols = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    n = len(symbols)
    if n <= 1:
        return 0.0
    return 2.0 * common_prefixes(symbols) / (n * (n + 1))


def common_prefixes(symbols: np.ndarray) -> int:
    """Sum of the longest common prefixes of neighbours in the suffix array of ``symbols`` [n].

    Prefix doubling: ``ranks[k][i]`` orders the first 2**k symbols from i on, until all differ.  Prefixes of two
    suffixes are then compared by the same ranks, the longest first.
    """
    n = len(symbols)
    ranks = [np.unique(symbols, return_inverse=True)[1].astype(np.int64)]
    order = np.argsort(ranks[0], kind="stable")
    while ranks[-1].max() < n - 1 and 1 << (len(ranks) - 1) < n:
        step, last = 1 << (len(ranks) - 1), ranks[-1]
        after = np.zeros(n, np.int64)  # 0: the text has ended
        after[:-step] = last[step:] + 1
        pairs = last * (n + 1) + after
        order = np.argsort(pairs, kind="stable")
        found = pairs[order]
        new = np.empty(n, np.int64)
        new[order] = np.concatenate([[0], np.cumsum(found[1:] != found[:-1])])
        ranks.append(new)
    left, right = order[:-1].copy(), order[1:].copy()
    total = 0
    for k in range(len(ranks) - 1, -1, -1):
        step = 1 << k
        fits = np.maximum(left, right) + step <= n
        same = np.zeros(len(left), bool)
        same[fits] = ranks[k][left[fits]] == ranks[k][right[fits]]
        total += step * int(same.sum())
        left[same] += step
        right[same] += step
    return total
