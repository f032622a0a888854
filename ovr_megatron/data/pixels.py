"""Turn pictures into patches under one image budget, through the processors of the model folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image

from ovr_megatron.config import DataConfig
from ovr_megatron.data.schema import Row, RowError, VideoPart
from ovr_megatron.families import ModelShape, family_of
from ovr_megatron.families.positions import Visual


class VideoMetadata(TypedDict):
    """What vLLM takes beside the frames of a video; the names are its own."""

    fps: float
    duration: float
    total_num_frames: int
    frames_indices: list[int]
    video_backend: str
    do_sample_frames: bool


Video = tuple[np.ndarray, VideoMetadata]  # uint8[frames, height, width, 3]


class PixelProcessor:
    """The image and the video processor of a model folder, held to ``data.min_pixels`` and ``data.max_pixels``.

    Attributes:
        mm_processor_kwargs: The same budget in the form that vLLM's argument of this name takes.
        video_options: Fields of the video processor beside the budget.
    """

    def __init__(
        self,
        image_processor: Any,
        video_processor: Any,
        shape: ModelShape,
        config: DataConfig,
    ) -> None:
        """Set the budget on both Hugging Face processors, which are changed in place."""
        self._image_processor = image_processor
        self._video_processor = video_processor
        self._shape = shape
        self._config = config
        self._family = family_of(shape)
        size = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}
        self.mm_processor_kwargs: dict[str, Any] = {"size": size}
        for processor in (image_processor, video_processor):
            processor.size = type(processor.size)(**size)  # as an argument it would lose to the folder's numbers
        self.video_options: dict[str, object] = {}
        if hasattr(video_processor, "cap_pixels_per_frame"):  # Transformers 5.22 turns it on
            video_processor.cap_pixels_per_frame = False
            self.video_options = {"cap_pixels_per_frame": False}
            self.mm_processor_kwargs["videos_kwargs"] = self.video_options

    def still(self, width: int, height: int) -> Visual:
        """Return the grid that an image of this size will have."""
        return self._family.image_grid(width, height, self._shape, self._config)

    def moving(self, frames: int, width: int, height: int, fps: float) -> Visual:
        """Return the grid and the time step that a video will have."""
        return self._family.video_grid(frames, width, height, fps, self._shape, self._config)

    def patches(
        self, images: Sequence[Image.Image], videos: Sequence[Video]
    ) -> tuple[Iterator[np.ndarray], Iterator[np.ndarray]]:
        """Process all images in one call and all videos in another.

        Returns:
            float32[patches, patch_dim] of each image, and of each video.
        """
        image_patches: Iterator[np.ndarray] = iter(())
        video_patches: Iterator[np.ndarray] = iter(())
        if images:
            outputs = self._image_processor(images=list(images), return_tensors="pt")
            image_patches = _split(outputs["pixel_values"], outputs["image_grid_thw"])
        if videos:
            frames = [pixels for pixels, _ in videos]
            # The frames are the sample: the processor must not draw others from them.
            outputs = self._video_processor(videos=frames, do_sample_frames=False, return_tensors="pt")
            video_patches = _split(outputs["pixel_values_videos"], outputs["video_grid_thw"])
        return image_patches, video_patches


def frame_size(sizes: Sequence[tuple[int, int]], row: Row) -> tuple[int, int]:
    """Return the width and height that all frames of a video have.

    Raises:
        RowError: they are not of one size.
    """
    distinct = sorted(set(sizes))
    if len(distinct) > 1:
        listing = ", ".join(f"{width} x {height}" for width, height in distinct)
        problem = f"has frames of different sizes ({listing})"
        raise RowError(row.where, "video", problem, "make all frames one size")
    return sizes[0]


def stack_frames(frames: Sequence[Image.Image], part: VideoPart, row: Row) -> Video:
    """Stack the opened frames of a video; its metadata says that they are to be taken as they are.

    Raises:
        RowError: the frames are not of one size.
    """
    # Again, of the decoded frames: before, only the sizes in their headers were compared.
    frame_size([frame.size for frame in frames], row)
    count = len(frames)
    metadata: VideoMetadata = {
        "fps": part.fps,
        "duration": count / part.fps,
        "total_num_frames": count,
        "frames_indices": list(range(count)),
        "video_backend": "frames",
        "do_sample_frames": False,
    }
    pixels = np.stack([np.asarray(frame) for frame in frames])
    return pixels, metadata


def _split(patches: torch.Tensor, grids: torch.Tensor) -> Iterator[np.ndarray]:
    """Split float32[P, patch_dim] into the patches of each grid of int64[n, 3]."""
    sizes = grids.prod(dim=1).numpy()
    ends = np.cumsum(sizes)
    # At the inner ends only: the last one would make an empty part more.
    parts = np.split(patches.numpy(), ends[:-1])
    return iter(parts)
