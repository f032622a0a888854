"""Repeatness of a text, the measure that Open-Reasoner-Zero logs (``playground/orz_7b_ppo.py``, "avg_repeat_score").

A text of n characters has n(n+1)/2 substrings; the repeatness is the share of those that occur further to the left as
well: 2 / (n(n+1)) times the sum of the longest common prefixes of neighbours in the suffix array.
"""

from __future__ import annotations

import numpy as np


def repeatness(text: str) -> float:
    """Return the share of repeated substrings, 0 (every one is new) to nearly 1 ("aaaa..."); O(n log^2 n) in numpy."""
    # Four bytes for each character; half a surrogate pair, which JSON may hold, counts as a character.
    encoded = text.encode("utf-32-le", "surrogatepass")
    symbols = np.frombuffer(encoded, np.uint32)
    n = len(symbols)
    if n <= 1:
        return 0.0
    repeated = common_prefixes(symbols)
    doubled_count = n * (n + 1)  # twice the number of substrings
    return 2.0 * repeated / doubled_count


def common_prefixes(symbols: np.ndarray) -> int:
    """Sum the longest common prefixes of neighbours in the suffix array of ``symbols`` [n].

    Prefix doubling (Manber and Myers 1990): ``ranks[k][i]`` is the rank of the suffix at i by its first 2**k symbols,
    and k rises until all ranks differ.  The common prefix of two neighbours is then the sum of the powers of two at
    which their ranks agree, the longest first.
    """
    n = len(symbols)
    _, symbol_ranks = np.unique(symbols, return_inverse=True)
    longest_ranks = symbol_ranks.astype(np.int64)
    ranks = [longest_ranks]
    order = np.argsort(longest_ranks, kind="stable")
    length = 1  # symbols by which the last ranks are
    while length < n:
        # All ranks differ: more symbols change no order.
        if longest_ranks.max() == n - 1:
            break
        order, longest_ranks = _doubled_ranks(longest_ranks, length)
        ranks.append(longest_ranks)
        length *= 2
    left = order[:-1].copy()
    right = order[1:].copy()
    total = 0
    for k in range(len(ranks) - 1, -1, -1):
        step = 1 << k
        furthest = np.maximum(left, right)
        fits = furthest + step <= n  # a prefix may not run past the end of the text
        left_ranks = ranks[k][left[fits]]
        right_ranks = ranks[k][right[fits]]
        same = np.zeros(len(left), bool)
        same[fits] = left_ranks == right_ranks
        count = int(same.sum())
        total += step * count
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
    # One integer for each pair of ranks, in the order of the pairs: a rank of the second half is at most n.
    pairs = ranks * (n + 1) + second_half
    order = np.argsort(pairs, kind="stable")
    sorted_pairs = pairs[order]
    differs_from_previous = sorted_pairs[1:] != sorted_pairs[:-1]
    sorted_ranks = np.concatenate([[0], np.cumsum(differs_from_previous)])
    doubled = np.empty(n, np.int64)
    doubled[order] = sorted_ranks
    return order, doubled
