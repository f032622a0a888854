"""What pictures become in Qwen3-VL: the grid of patches that Transformers resizes them to, and the times of a video."""

from __future__ import annotations

from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as resized_image
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as resized_video

from ovr_megatron.config import DataConfig
from ovr_megatron.families import ModelShape
from ovr_megatron.families.positions import Visual


def image_grid(width: int, height: int, shape: ModelShape, config: DataConfig) -> Visual:
    """Return the grid that an image of this size will have under the image budget."""
    vision = shape.vision
    # Transformers' own function, here and below: the grid must be the one that its processor makes of the picture.
    height, width = resized_image(
        height,
        width,
        factor=vision.patch * vision.merge,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
    )
    return Visual((1, height // vision.patch, width // vision.patch))


def video_grid(
    frames: int,
    width: int,
    height: int,
    fps: float,
    shape: ModelShape,
    config: DataConfig,
) -> Visual:
    """Return the grid and the times that a video will have; a last odd frame counts twice.

    The image budget is that of all frames together, as Transformers' processor and vLLM take it.
    """
    vision = shape.vision
    step = vision.temporal_patch
    height, width = resized_video(
        frames,
        height,
        width,
        temporal_factor=step,
        factor=vision.patch * vision.merge,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
    )
    slices = -(-frames // step)
    times = []
    for index in range(slices):
        first = index * step
        last = min(first + step, frames) - 1
        times.append((first / fps + last / fps) / 2)
    grid = (slices, height // vision.patch, width // vision.patch)
    return Visual(grid, seconds=step / fps, times=tuple(times))
