"""M-RoPE positions of one document: three rows (time, height, width) over its tokens.

They are computed once, when the sample is built, and travel with the tokens from there on; nothing later
derives positions from a pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

AFTER_VIDEO = ("grid", "extent")
SERVED_AFTER_VIDEO = "extent"  # `Qwen2_5_VLForConditionalGeneration.get_mrope_input_positions` of vLLM 0.32


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


def mrope_positions(
    segments: Sequence[int | Visual], merge: int, tokens_per_second: float, after_video: str = "grid"
) -> np.ndarray:
    """Positions of a document that consists of ``segments`` in order.

    Text counts up in all three rows.  A visual that starts at position p has p + floor(slice x seconds x
    tokens_per_second) in the time row (p for an image) and p + its row and p + its column, in merged
    patches, in the others.  Where the text goes on after it is not agreed upon for videos:

    - ``grid``: at p + max(height, width).  `Qwen2_5_VLModel.get_rope_index` of Transformers 5.3 and later.
    - ``extent``: one past the largest position, time included.  Transformers 4 and vLLM.

    For images, and for videos that are shorter than they are large, both agree.

    Args:
        segments: Lengths of text stretches, and visuals.
        merge: Merge size of the vision tower, per side.
        tokens_per_second: Positions per second of video (``vision_config.tokens_per_second``).
        after_video: ``grid`` or ``extent``.

    Returns:
        int64[3, S].
    """
    assert after_video in AFTER_VIDEO, after_video
    start, blocks = 0, [np.zeros((3, 0), np.int64)]
    for segment in segments:
        if isinstance(segment, Visual):
            block = start + _visual(segment, merge, tokens_per_second, after_video)
            _, h, w = segment.grid
            start = start + max(h, w) // merge if after_video == "grid" else int(block.max()) + 1
        else:
            block = np.broadcast_to(np.arange(start, start + segment), (3, segment))
            start += segment
        blocks.append(block)
    return np.concatenate(blocks, axis=1)


def _visual(visual: Visual, merge: int, tokens_per_second: float, after_video: str) -> np.ndarray:
    """Offsets from its start, int64[3, features]: rows vary slowest in time, fastest in width."""
    t, h, w = visual.grid
    block = np.indices((t, h // merge, w // merge), dtype=np.int64)
    if visual.seconds is not None:
        # The seconds reach both libraries as float32; Transformers goes on in float32, vLLM in float64.
        number = np.dtype(np.float32 if after_video == "grid" else np.float64)
        step = np.array([visual.seconds], np.float32).astype(number) * np.array([tokens_per_second], number)
        block[0] = (np.arange(t, dtype=number) * step).astype(np.int64)[:, None, None]
    return block.reshape(3, -1)


def continue_positions(position_ids: np.ndarray, tokens: int) -> np.ndarray:
    """Positions of ``tokens`` more text tokens after a document that ends in text: int64[3, tokens]."""
    assert position_ids.shape[1] and (position_ids[:, -1] == position_ids[0, -1]).all(), "must end in text"
    start = position_ids[0, -1] + 1
    return np.tile(np.arange(start, start + tokens), (3, 1))
