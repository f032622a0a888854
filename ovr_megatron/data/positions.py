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
    """Compute the positions of a document that consists of ``segments`` in order.

    Text counts up in all three rows.  A visual that starts at position p has p + floor(slice x seconds x
    tokens_per_second) in the time row (p for an image) and p + its row and p + its column, in merged
    patches, in the others.  Libraries disagree on the position at which text continues after a video:

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
    start = 0
    blocks: list[np.ndarray] = [np.zeros((3, 0), np.int64)]
    for segment in segments:
        if not isinstance(segment, Visual):
            blocks.append(np.broadcast_to(np.arange(start, start + segment), (3, segment)))
            start += segment
            continue
        block = start + _visual_offsets(segment, merge, tokens_per_second, after_video)
        blocks.append(block)
        if after_video == "grid":
            _, h, w = segment.grid
            start += max(h, w) // merge  # whatever its time row has reached
        else:
            start = int(block.max()) + 1
    return np.concatenate(blocks, axis=1)


def _visual_offsets(visual: Visual, merge: int, tokens_per_second: float, after_video: str) -> np.ndarray:
    """Return the offsets from a visual's start, int64[3, features]: tokens vary slowest in time, fastest in width."""
    t, h, w = visual.grid
    block = np.indices((t, h // merge, w // merge), dtype=np.int64)
    if visual.seconds is not None:
        # The seconds reach both libraries as float32; Transformers goes on in float32, vLLM in float64.
        dtype = np.dtype(np.float32 if after_video == "grid" else np.float64)
        seconds = np.array([visual.seconds], np.float32).astype(dtype)
        step = seconds * np.array([tokens_per_second], dtype)
        # The product is cut off only here: rounding the step would add up over the slices.
        times = (np.arange(t, dtype=dtype) * step).astype(np.int64)
        block[0] = times[:, None, None]
    return block.reshape(3, -1)


def continue_positions(position_ids: np.ndarray, tokens: int) -> np.ndarray:
    """Return the positions of ``tokens`` more text tokens after a document that ends in text: int64[3, tokens]."""
    assert position_ids.shape[1] and (position_ids[:, -1] == position_ids[0, -1]).all(), "must end in text"
    start = position_ids[0, -1] + 1
    return np.tile(np.arange(start, start + tokens), (3, 1))
