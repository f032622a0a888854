"""FLOP against torch's counter on Transformers' model."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLForConditionalGeneration

from ovr_megatron.families import ModelShape
from ovr_megatron.model.flops import training_flops
from ovr_megatron.model.tiny import make_tiny_model

TOKENS = 96


@pytest.mark.parametrize("trains", [True, False])
def test_language_model(tmp_path: Path, trains: bool) -> None:
    folder = make_tiny_model(tmp_path, tied=False, seed=1)
    shape = ModelShape.from_hf(folder)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    embedded = torch.randn(1, TOKENS, shape.hidden, requires_grad=True)
    model.requires_grad_(trains)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embedded, position_ids=torch.arange(TOKENS).expand(3, 1, -1)).logits.sum().backward()
    # The counter takes the whole square of attention, a mask or not.
    other_half = 6.0 * shape.layers * shape.heads * shape.head_dim * TOKENS**2
    ours = training_flops(shape, [TOKENS], language_trains=trains)
    assert counter.get_total_flops() == pytest.approx(ours + other_half, rel=0.01)


def test_vision_tower(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, tied=False, seed=1)
    shape = ModelShape.from_hf(folder)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    side = shape.vision.window // shape.vision.patch  # one window is the whole picture
    grid = (1, side, side)
    patches = torch.randn(side * side, shape.vision.patch_dim)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model.visual(patches, grid_thw=torch.tensor([grid]))
    assert counter.get_total_flops() == pytest.approx(training_flops(shape, [], [grid]), rel=0.01)
