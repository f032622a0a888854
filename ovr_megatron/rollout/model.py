"""vLLM's Qwen2.5-VL with the trainer's conventions: the same ids banned, positions and rotary frequencies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm import ModelRegistry
from vllm.config import ModelConfig
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding
from vllm.model_executor.model_loader import BaseModelLoader, register_model_loader
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

from ovr_megatron.data.positions import SERVED_AFTER_VIDEO, Visual, mrope_positions
from ovr_megatron.model.rope import inverse_frequencies
from ovr_megatron.model.shape import ModelShape

EMPTY = "empty"  # the load format of `EmptyLoader`
_ROWS_AT_ONCE = 1 << 16


class RolloutModel(Qwen2_5_VLForConditionalGeneration):
    """The model that vLLM runs.

    Banned ids are masked where the logits arise, once for the batch: whatever vLLM then does with them, greedy
    choice, sampling and log-probabilities, is normalised over the rest.  A ``logit_bias`` would cost Python time
    for each request and id, and would be no exact zero.
    """

    banned: Tensor | None = None
    after_video: str = SERVED_AFTER_VIDEO

    def follow(self, banned: Sequence[int], after_video: str, shape: ModelShape) -> None:
        """Never sample ``banned``; go on after a video as ``after_video`` says; turn by the angles of ``shape``."""
        # A plain attribute, made here: what vLLM has as buffers moves with its sleep.
        self.banned = torch.tensor(banned, dtype=torch.long, device=next(self.parameters()).device)
        self.after_video = after_video
        for module in self.modules():
            if isinstance(module, MRotaryEmbedding):
                fill_rotary_cache(module.cos_sin_cache, shape)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits [n, V] of hidden states [n, D]; None on the tensor-parallel ranks that vLLM gives none."""
        logits = super().compute_logits(hidden_states)
        if logits is not None and self.banned is not None:
            logits.index_fill_(-1, self.banned, float("-inf"))
        return logits

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Positions [3, S] of a prompt, and what to add to an index to get the position of a later token."""
        segments: list[int | Visual] = []
        merge, start = self.config.vision_config.spatial_merge_size, 0
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


@register_model_loader(EMPTY)
class EmptyLoader(BaseModelLoader):
    """Reads nothing: all parameters are zero until the trainer's come.

    vLLM's own loader of no weights writes over buffers, too, such as the mean and the deviation of an image.
    """

    def download_model(self, model_config: ModelConfig) -> None:
        """There is nothing to fetch."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Fill ``model`` with zeros."""
        for parameter in model.parameters():
            parameter.data.zero_()


@torch.no_grad()
def fill_rotary_cache(cache: Tensor, shape: ModelShape) -> None:
    """Write cosines and sines of the trainer's angles to ``cache`` [positions, head_dim], in place.

    With M-RoPE vLLM cuts YaRN's ramp for four times the original positions, where Transformers takes the positions
    themselves; without YaRN its frequencies, computed on its device, may differ in the last bit.
    """
    frequencies, scaling = inverse_frequencies(shape)
    frequencies = frequencies.to(cache.device)
    for first in range(0, len(cache), _ROWS_AT_ONCE):
        rows = cache[first : first + _ROWS_AT_ONCE]
        angles = torch.arange(first, first + len(rows), device=cache.device).float()[:, None] * frequencies
        rows.copy_(torch.cat((angles.cos(), angles.sin()), dim=-1) * scaling)


# Given as a class, not by name: vLLM would otherwise inspect the model in a fresh interpreter, which takes
# seconds and lacks what lets torchvision import on a machine without a GPU.
ModelRegistry.register_model("Qwen2_5_VLForConditionalGeneration", RolloutModel)
