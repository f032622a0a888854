"""Qwen3-VL for the trainer: its vision tower, and interleaved M-RoPE."""

from __future__ import annotations

import torch
from torch import Tensor

from ovr_megatron.config import ParallelConfig
from ovr_megatron.families import ModelShape
from ovr_megatron.families.qwen3_vl.shape import vision_shape
from ovr_megatron.families.qwen3_vl.vision import DeepStackTower
from ovr_megatron.model.layers import LayerClasses
from ovr_megatron.model.transformer_config import vision_config
from ovr_megatron.model.vision_language import VisionLanguageModel


class Qwen3VL(VisionLanguageModel):
    """One pipeline stage of Qwen3-VL, or one interleaved part of it."""

    def build_vision(
        self,
        shape: ModelShape,
        parallel: ParallelConfig,
        dtype: torch.dtype,
        classes: LayerClasses,
    ) -> DeepStackTower:
        """Return the vision tower on this rank."""
        config = vision_config(shape.vision, parallel, dtype)
        return DeepStackTower(vision_shape(shape), shape.hidden, config, self.pg_collection, classes)

    def rotary_rows(self, shape: ModelShape) -> Tensor:
        """Return time, height, width, time, ... for the pairs, and time where a section has all of its pairs."""
        _, height_pairs, width_pairs = shape.mrope_section
        rows = torch.zeros(shape.head_dim // 2, dtype=torch.int64)
        rows[1 : 3 * height_pairs : 3] = 1
        rows[2 : 3 * width_pairs : 3] = 2
        return rows
