"""Qwen2.5-VL for the trainer: its vision tower, and M-RoPE in sections."""

from __future__ import annotations

import torch
from torch import Tensor

from ovr_megatron.config import ParallelConfig
from ovr_megatron.families import ModelShape
from ovr_megatron.families.qwen2_5_vl.shape import vision_shape
from ovr_megatron.families.qwen2_5_vl.vision import VisionTower
from ovr_megatron.model.layers import LayerClasses
from ovr_megatron.model.transformer_config import vision_config
from ovr_megatron.model.vision_language import VisionLanguageModel


class Qwen25VL(VisionLanguageModel):
    """One pipeline stage of Qwen2.5-VL, or one interleaved part of it."""

    def build_vision(
        self,
        shape: ModelShape,
        parallel: ParallelConfig,
        dtype: torch.dtype,
        classes: LayerClasses,
    ) -> VisionTower:
        """Return the vision tower on this rank."""
        config = vision_config(shape.vision, parallel, dtype)
        return VisionTower(vision_shape(shape), shape.hidden, config, self.pg_collection, classes)

    def rotary_rows(self, shape: ModelShape) -> Tensor:
        """Return time, height and width for the pairs of the three sections, one section after the other."""
        return torch.repeat_interleave(torch.arange(3), torch.tensor(shape.mrope_section))
