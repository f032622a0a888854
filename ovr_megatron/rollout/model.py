"""vLLM's models with the trainer's conventions: the same ids banned, positions and rotary frequencies."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from vllm import ModelRegistry
from vllm.config import ModelConfig
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding
from vllm.model_executor.model_loader import BaseModelLoader, register_model_loader

from ovr_megatron.families import Family, ModelShape
from ovr_megatron.model.rope import inverse_frequencies

EMPTY = "empty"  # the load format of `EmptyLoader`
_ROWS_AT_ONCE = 1 << 16


class RolloutModel(nn.Module):
    """What the trainer adds to a model that vLLM runs; a family's class has it before vLLM's class.

    Banned ids are masked where the logits arise, once for the batch: whatever vLLM then does with them, greedy
    choice, sampling and log-probabilities, is normalised over the rest.  A ``logit_bias`` would cost Python time
    for each request and id, and would be no exact zero.
    """

    banned: Tensor | None = None
    after_video: str

    def follow(self, banned: Sequence[int], after_video: str, shape: ModelShape) -> None:
        """Never sample ``banned``; go on after a video as ``after_video`` says; turn by the angles of ``shape``."""
        # A plain attribute, made here: what vLLM has as buffers moves with its sleep.
        self.banned = torch.tensor(banned, dtype=torch.long, device=next(self.parameters()).device)
        self.after_video = after_video
        for module in self.modules():
            if isinstance(module, MRotaryEmbedding):
                fill_rotary_cache(module.cos_sin_cache, shape)

    def clear_state(self) -> None:
        """Zero tensors beside the weights that are read before they are written; a family may have some."""

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits [n, V] of hidden states [n, D]; None on the tensor-parallel ranks that vLLM gives none."""
        logits = super().compute_logits(hidden_states)
        if logits is not None and self.banned is not None:
            logits.index_fill_(-1, self.banned, float("-inf"))
        return logits


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


@functools.cache
def register_model(family: Family) -> None:
    """Have vLLM run the family's `RolloutModel`, once a process."""
    # Given as a class, not by name: vLLM would otherwise inspect the model in a fresh interpreter, which takes
    # seconds and lacks what lets torchvision import on a machine without a GPU.
    ModelRegistry.register_model(family.architecture, family.load_rollout_class())
