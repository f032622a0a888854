"""One tokenised document with its patches and positions; free of torch and Transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image

from ovr_megatron.data.schema import Row

if TYPE_CHECKING:
    from ovr_megatron.data.pixels import Video


@dataclass
class Sample:
    """One document, ready to be packed or sent to the rollout engine.  S tokens, P patches, F features.

    Attributes:
        tokens: int64[S]; each image and video takes one token per feature.
        loss_mask: bool[S]; True where the token itself is a training target.
        position_ids: int64[3, S].
        patches: float32[P, patch_dim], of images and videos in the order of the tokens.
        grid_thw: int64[n, 3], patches in time, height and width of each image or video.
        placement: int64[F], index in ``tokens`` of each feature; F = P / merge^2.
        images: Pictures for the engine.
        videos: Videos for the engine.
        prompt_tokens: The engine's prompt: one placeholder for each image or video, no response.
        row: The row that the sample was made of.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    position_ids: np.ndarray
    patches: np.ndarray
    grid_thw: np.ndarray
    placement: np.ndarray
    images: list[PIL.Image.Image]
    videos: list[Video]
    prompt_tokens: list[int]
    row: Row

    def __len__(self) -> int:
        """Return S."""
        return len(self.tokens)
