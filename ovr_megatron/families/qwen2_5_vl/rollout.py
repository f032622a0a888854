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
        vision = self.config.vision_config
        segments: list[int | Visual] = []
        start = 0
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            offset = feature.mm_position.offset
            kind = feature.modality
            grid = tuple(feature.data[f"{kind}_grid_thw"].data.tolist())
            seconds = None
            if kind == "video":
                seconds = float(feature.data["second_per_grid_ts"].data)
            text_length = offset - start
            segments.append(text_length)
            segments.append(Visual(grid, seconds))
            start = offset + feature.mm_position.length
        last_text_length = len(input_tokens) - start
        segments.append(last_text_length)
        positions = mrope_positions(
            segments,
            vision.spatial_merge_size,
            vision.tokens_per_second,
            self.after_video,
        )
        # A prompt's last token is text, whose three rows are equal; generated tokens are text, too.
        next_position = int(positions[0, -1]) + 1
        return torch.from_numpy(positions), next_position - len(input_tokens)
