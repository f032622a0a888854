"""Qwen3-VL as vLLM runs it here."""

from __future__ import annotations

from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration

from ovr_megatron.rollout.model import RolloutModel


class Qwen3VLRollout(RolloutModel, Qwen3VLForConditionalGeneration):
    """vLLM's model with the trainer's conventions; its positions are the trainer's."""

    def clear_state(self) -> None:
        """Zero the features for the decoder's first layers, which a batch without images reads as they are."""
        for features in self.deepstack_input_embeds:
            features.zero_()
