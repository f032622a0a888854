"""Positions of one document: three rows (time, height, width) over its tokens, which a family computes.

They are computed once, when the sample is built, and travel with the tokens from there on; nothing later derives
positions from a pack.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# The rules by which a text goes on after a video, see `Family.positions`.
AFTER_VIDEO = ("grid", "extent")


@dataclass(frozen=True)
class Visual:
    """An image or a video between two stretches of text.

    Attributes:
        grid: Patches in time, height and width (t, h, w), before the merger.
        seconds: Seconds from one of the t slices to the next; None for a still image.
    """

    grid: tuple[int, int, int]
    seconds: float | None = None

    def features(self, merge: int) -> int:
        """Return the number of tokens it takes: patches after merging ``merge`` x ``merge`` of them."""
        t, h, w = self.grid
        return t * (h // merge) * (w // merge)


def continue_positions(position_ids: np.ndarray, tokens: int) -> np.ndarray:
    """Return the positions of ``tokens`` more text tokens after a document that ends in text: int64[3, tokens]."""
    assert position_ids.shape[1] and (position_ids[:, -1] == position_ids[0, -1]).all(), "must end in text"
    start = position_ids[0, -1] + 1
    return np.tile(np.arange(start, start + tokens), (3, 1))
