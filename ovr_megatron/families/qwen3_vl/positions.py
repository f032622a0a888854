"""M-RoPE positions of one document: three rows (time, height, width) over its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ovr_megatron.families import ModelShape
from ovr_megatron.families.positions import AFTER_VIDEO, Visual


def positions(segments: Sequence[int | Visual], shape: ModelShape, after_video: str) -> np.ndarray:
    """Compute the positions of a document that consists of ``segments`` in order.

    Text counts up in all three rows.  An image, or a slice of a video, that starts at position p has p in the time row
    and p + its row and p + its column, in merged patches, in the others; text goes on at p + max(height, width).  The
    time of a slice stands in the text before it.

    Args:
        segments: Lengths of text stretches, and visuals of one slice each.
        shape: Sizes of the model.
        after_video: Without effect: a visual is never longer than it is large, so that both rules agree.

    Returns:
        int64[3, S].
    """
    assert after_video in AFTER_VIDEO, after_video
    merge = shape.vision.merge
    start = 0
    blocks: list[np.ndarray] = [np.zeros((3, 0), np.int64)]
    for segment in segments:
        if not isinstance(segment, Visual):
            text_positions = np.arange(start, start + segment)
            blocks.append(np.broadcast_to(text_positions, (3, segment)))
            start += segment
            continue
        slices, height, width = segment.grid
        assert slices == 1, "a video is divided into its slices, see `segments`"
        rows = height // merge
        columns = width // merge
        offsets = np.indices((1, rows, columns), dtype=np.int64).reshape(3, -1)
        blocks.append(start + offsets)
        start += max(rows, columns)
    return np.concatenate(blocks, axis=1)
