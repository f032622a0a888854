"""Match rows with columns so that the sum of their gains is the largest: the Hungarian method."""

from __future__ import annotations

import numpy as np


def best_assignment(gains: np.typing.ArrayLike) -> list[tuple[int, int]]:
    """Return pairs of row and column, none of which comes twice, with the largest sum of ``gains`` [n, m].

    The Hungarian method with potentials: one shortest augmenting path for each row (Jonker and Volgenant 1987).

    Returns:
        min(n, m) pairs, by row.
    """
    costs = -np.asarray(gains, np.float64)
    if costs.shape[0] > costs.shape[1]:
        return sorted((row, column) for column, row in best_assignment(-costs.T))
    rows, columns = costs.shape
    row_potential = np.zeros(rows)
    column_potential = np.zeros(columns)
    row_of_column = np.full(columns, -1)
    for start in range(rows):
        _augment(start, costs, row_potential, column_potential, row_of_column)
    return sorted((int(row), column) for column, row in enumerate(row_of_column) if row >= 0)


def _augment(
    start: int,
    costs: np.ndarray,
    row_potential: np.ndarray,
    column_potential: np.ndarray,
    row_of_column: np.ndarray,
) -> None:
    """Add row ``start`` to the assignment along the cheapest path to a free column; change the last three in place."""
    columns = costs.shape[1]
    distance = np.full(columns, np.inf)
    previous = np.full(columns, -1)  # column before each on the shortest path; -1 where that is ``start``
    reached = np.zeros(columns, bool)
    row = start
    column = -1
    shortest = 0.0
    while True:
        reduced = shortest + costs[row] - row_potential[row] - column_potential
        improves = ~reached & (reduced < distance)
        distance[improves] = reduced[improves]
        previous[improves] = column
        column = int(np.where(reached, np.inf, distance).argmin())
        shortest = float(distance[column])
        if row_of_column[column] < 0:
            break
        reached[column] = True
        row = int(row_of_column[column])
    # Reduced costs stay at least 0, and those of assigned pairs 0.
    row_potential[start] += shortest
    row_potential[row_of_column[reached]] += shortest - distance[reached]
    column_potential[reached] -= shortest - distance[reached]
    while column >= 0:
        before = int(previous[column])
        row_of_column[column] = start if before < 0 else row_of_column[before]
        column = before
