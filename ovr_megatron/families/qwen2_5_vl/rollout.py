"""Qwen2.5-VL as vLLM runs it here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

from ovr_megatron.families.positions import Visual
from ovr_megatron.families.qwen2_5_vl.positions import mrope_positions
from ovr_megatron.families.qwen2_5_vl.shape import SERVED_AFTER_VIDEO
from ovr_megatron.rollout.model import RolloutModel


class Qwen25VLRollout(RolloutModel, Qwen2_5_VLForConditionalGeneration):
    """vLLM's model with the trainer's conventions, positions among them."""

    after_video = SERVED_AFTER_VIDEO

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Return positions [3, S] of a prompt, and what to add to an index to get the position of a later token."""
        segments: list[int | Visual] = []
        merge = self.config.vision_config.spatial_merge_size
        start = 0
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            data, kind = feature.data, feature.modality
            grid = tuple(data[f"{kind}_grid_thw"].data.tolist())
            seconds = float(data["second_per_grid_ts"].data) if kind == "video" else None
            segments += [feature.mm_position.offset - start, Visual(grid, seconds)]
            start = feature.mm_position.offset + feature.mm_position.length
        segments.append(len(input_tokens) - start)
        per_second = self.config.vision_config.tokens_per_second
        positions = mrope_positions(segments, merge, per_second, self.after_video)
        return torch.from_numpy(positions), int(positions[0, -1]) + 1 - len(input_tokens)
