"""What pictures become in Qwen2.5-VL: the grid of patches that Transformers resizes them to."""

from __future__ import annotations

from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from ovr_megatron.config import DataConfig
from ovr_megatron.families import ModelShape
from ovr_megatron.families.positions import Visual


def image_grid(width: int, height: int, shape: ModelShape, config: DataConfig) -> Visual:
    """Return the grid that an image of this size will have under the image budget."""
    rows, columns = _grid(height, width, shape, config)
    return Visual((1, rows, columns))


def video_grid(
    frames: int,
    width: int,
    height: int,
    fps: float,
    shape: ModelShape,
    config: DataConfig,
) -> Visual:
    """Return the grid and the time step that a video will have; a last odd frame counts twice."""
    step = shape.vision.temporal_patch
    slices = -(-frames // step)
    rows, columns = _grid(height, width, shape, config)
    seconds = step / fps
    return Visual((slices, rows, columns), seconds=seconds)


def _grid(
    height: int,
    width: int,
    shape: ModelShape,
    config: DataConfig,
) -> tuple[int, int]:
    """Return the rows and columns of patches of a picture, resized as Transformers does."""
    patch = shape.vision.patch
    side = patch * shape.vision.merge
    # Transformers' own function: the grid must be the one that its processor makes of the picture.
    height, width = smart_resize(
        height,
        width,
        factor=side,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
    )
    return height // patch, width // patch
