"""Measures that grade perception: the overlap of boxes and the edit distance of texts."""

from __future__ import annotations

Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a rectangle."""


def overlap(first: Box, second: Box) -> float:
    """Return the intersection over union of two boxes, 0 where neither has an area."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    intersection = max(width, 0.0) * max(height, 0.0)
    union = _area(first) + _area(second) - intersection
    return intersection / union if union > 0 else 0.0


def _area(box: Box) -> float:
    x0, y0, x1, y1 = box
    return (x1 - x0) * (y1 - y0)


def edit_distance(first: str, second: str) -> int:
    """Return the Levenshtein distance: the fewest insertions, deletions and substitutions of a character.

    Bit-parallel over the columns of the table (Myers 1999, in the form of Hyyrö 2003): an integer of as many bits as
    ``first`` has characters holds where a column rises (``plus``) or falls (``minus``) from one row to the next.
    """
    if not first:
        return len(second)
    positions: dict[str, int] = {}  # by character, the bits of its places in ``first``
    for index, character in enumerate(first):
        positions[character] = positions.get(character, 0) | 1 << index
    mask = (1 << len(first)) - 1
    last = 1 << (len(first) - 1)
    plus = mask
    minus = 0
    distance = len(first)
    for character in second:
        equal = positions.get(character, 0)
        diagonal_zero = (((equal & plus) + plus) ^ plus) | equal | minus
        rises = minus | (mask & ~(diagonal_zero | plus))
        falls = plus & diagonal_zero
        if rises & last:
            distance += 1
        elif falls & last:
            distance -= 1
        # The first row of the table rises with every column.
        rises = (rises << 1 | 1) & mask
        falls = (falls << 1) & mask
        plus = falls | (mask & ~(diagonal_zero | rises))
        minus = rises & diagonal_zero
    return distance
