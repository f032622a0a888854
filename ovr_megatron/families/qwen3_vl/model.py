"""Qwen3-VL for the trainer: its vision tower, and interleaved M-RoPE."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ovr_megatron.config import ParallelConfig
from ovr_megatron.families import ModelShape
from ovr_megatron.families.qwen3_vl.shape import vision_shape
from ovr_megatron.families.qwen3_vl.vision import DeepStackTower
from ovr_megatron.model.layers import LayerClasses
from ovr_megatron.model.transformer_config import transformer_config
from ovr_megatron.model.vision_language import VisionLanguageModel


def vision_config(shape: ModelShape, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
    """Return Megatron's configuration of the vision tower: no pipeline, no sequence parallelism."""
    vision = shape.vision
    return transformer_config(
        parallel,
        dtype,
        num_layers=vision.depth,
        hidden_size=vision.hidden,
        ffn_hidden_size=vision.ffn,
        num_attention_heads=vision.heads,
        normalization="LayerNorm",
        # Transformers has this number in the code of the tower, not in its configuration.
        layernorm_epsilon=1e-6,
        gated_linear_unit=False,
        activation_func=partial(F.gelu, approximate="tanh"),
        use_te_activation_func=False,
        add_bias_linear=True,
        add_qkv_bias=True,
    )


class Qwen3VL(VisionLanguageModel):
    """One pipeline stage of Qwen3-VL, or one interleaved part of it."""

    def build_vision(
        self, shape: ModelShape, parallel: ParallelConfig, dtype: torch.dtype, classes: LayerClasses
    ) -> DeepStackTower:
        """Return the vision tower on this rank."""
        config = vision_config(shape, parallel, dtype)
        return DeepStackTower(vision_shape(shape), shape.hidden, config, self.pg_collection, classes)

    def rotary_rows(self, shape: ModelShape) -> Tensor:
        """Return time, height, width, time, ... for the pairs, and time where a section has all of its pairs."""
        _, height_pairs, width_pairs = shape.mrope_section
        rows = torch.zeros(shape.head_dim // 2, dtype=torch.int64)
        rows[1 : 3 * height_pairs : 3] = 1
        rows[2 : 3 * width_pairs : 3] = 2
        return rows
