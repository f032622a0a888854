"""Balance work over ranks: a function of the costs alone, so that every rank computes the same shares."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np


def balance(
    costs: Sequence[float] | np.ndarray,
    bins: int,
    equal_counts: bool = False,
    in_order: bool = False,
) -> list[list[int]]:
    """Balance items over ``bins``: each item goes to the bin with the least cost so far, of equals to the first.

    The most expensive item is placed first (longest processing time first: Graham, "Bounds on multiprocessing timing
    anomalies", 1969), of equals the first in ``costs``.

    Args:
        costs: Cost of each item, in any unit.
        bins: Number of bins.
        equal_counts: Whether every bin gets as many items as any other, or one fewer.
        in_order: Whether the items are placed in the order of ``costs``.

    Returns:
        For each bin the indices of its items in the order in which they were placed.
    """
    costs = np.asarray(costs).tolist()
    items = list(range(len(costs)))
    if not in_order:
        # A stable sort: every rank must place items of equal cost in the same order.
        items.sort(key=lambda item: -costs[item])
    shares: list[list[int]] = [[] for _ in range(bins)]
    heap: list[tuple[float, int]] = [(0, index) for index in range(bins)]
    capacity = len(costs)  # items of a bin
    if equal_counts:
        capacity = -(-len(costs) // bins)  # rounded up
    larger_bins = len(costs) - (capacity - 1) * bins  # that may yet get `capacity` items; the others get one fewer
    for item in items:
        load, index = heapq.heappop(heap)
        while equal_counts and len(shares[index]) == capacity - 1 and not larger_bins:
            load, index = heapq.heappop(heap)  # the bin before it is full
        if len(shares[index]) == capacity - 1:
            larger_bins -= 1
        shares[index].append(item)
        if len(shares[index]) < capacity:
            heapq.heappush(heap, (load + costs[item], index))
    return shares
