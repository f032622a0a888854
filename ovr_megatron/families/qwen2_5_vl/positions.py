"""M-RoPE positions of one document: three rows (time, height, width) over its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ovr_megatron.families import ModelShape
from ovr_megatron.families.positions import AFTER_VIDEO, Visual
from ovr_megatron.families.qwen2_5_vl.shape import vision_shape


def positions(segments: Sequence[int | Visual], shape: ModelShape, after_video: str) -> np.ndarray:
    """Return `mrope_positions` of a document, int64[3, S], for a model of these sizes."""
    vision = vision_shape(shape)
    return mrope_positions(segments, vision.merge, vision.tokens_per_second, after_video)


def mrope_positions(
    segments: Sequence[int | Visual],
    merge: int,
    tokens_per_second: float,
    after_video: str = "grid",
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
            text_positions = np.arange(start, start + segment)
            block = np.broadcast_to(text_positions, (3, segment))
            blocks.append(block)
            start += segment
            continue
        block = start + _visual_offsets(segment, merge, tokens_per_second, after_video)
        blocks.append(block)
        if after_video == "grid":
            _, h, w = segment.grid
            start += max(h, w) // merge  # whatever its time row has reached
        else:
            last = int(block.max())
            start = last + 1
    return np.concatenate(blocks, axis=1)


def _visual_offsets(
    visual: Visual,
    merge: int,
    tokens_per_second: float,
    after_video: str,
) -> np.ndarray:
    """Return the offsets from a visual's start, int64[3, features]: tokens vary slowest in time, fastest in width."""
    t, h, w = visual.grid
    block = np.indices((t, h // merge, w // merge), dtype=np.int64)
    if visual.seconds is not None:
        # The seconds reach both libraries as float32; Transformers goes on in float32, vLLM in float64.
        dtype = np.dtype(np.float32 if after_video == "grid" else np.float64)
        seconds = np.array([visual.seconds], np.float32).astype(dtype)
        rate = np.array([tokens_per_second], dtype)
        step = seconds * rate
        # The product is cut off only here: rounding the step would add up over the slices.
        slices = np.arange(t, dtype=dtype)
        times = (slices * step).astype(np.int64)
        block[0] = times[:, None, None]
    return block.reshape(3, -1)
