"""Qwen3-VL's configuration, rotary angles, positions and features, beside Transformers and vLLM."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding
from transformers.vision_utils import get_vision_interpolation_indices_and_weights
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration

from ovr_megatron.data.expansion import expand, merge_text_lengths
from ovr_megatron.families import ModelShape, family_of
from ovr_megatron.families.config_json import ShapeError
from ovr_megatron.families.positions import Visual
from ovr_megatron.families.qwen3_vl.model import Qwen3VL
from ovr_megatron.families.qwen3_vl.vision import frame_layout
from ovr_megatron.families.stretch import stretch_positions
from ovr_megatron.model.attention import rotary_table
from ovr_megatron.model.rope import inverse_frequencies
from ovr_megatron.model.tiny import TinySizes, make_tiny_model

SIZES = TinySizes(layers=2, hidden=64, ffn=64, vision_hidden=32, vision_ffn=32, vision_depth=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path, sizes=SIZES, family="qwen3_vl")


def edit(folder: Path, part: str, **values: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    fields = config
    for name in part.split(".") if part else ():
        fields = fields[name]
    fields.update(values)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("", {"text_config": None}, "field 'text_config' is None and not an object"),
        ("text_config", {"attention_bias": True}, "field 'text_config.attention_bias' is True"),
        (
            "text_config",
            {"rope_scaling": {"mrope_section": [6, 5, 5]}},
            "'text_config.rope_scaling.mrope_interleaved' is m",
        ),
        (
            "text_config.rope_scaling",
            {"mrope_interleaved": False},
            "'text_config.rope_scaling.mrope_interleaved' is False",
        ),
        ("text_config.rope_scaling", {"mrope_section": [6, 5, 4]}, "is not three numbers of sum 16"),
        ("vision_config", {"hidden_act": "silu"}, "field 'vision_config.hidden_act' is 'silu'"),
        ("vision_config", {"num_position_embeddings": 50}, "num_position_embeddings 50 is not the square of a whole"),
        ("vision_config", {"deepstack_visual_indexes": [2, 0]}, r"deepstack_visual_indexes \[2, 0\] does not rise"),
        ("vision_config", {"deepstack_visual_indexes": [0, 3]}, "names block 3, and the tower has 3"),
        (
            "vision_config",
            {"deepstack_visual_indexes": [0, 1, 2]},
            "names 3 blocks, and the language model has 2 layers",
        ),
        ("vision_config", {"out_hidden_size": 32}, "out_hidden_size 32 is not hidden_size 64"),
    ],
)
def test_what_is_not_computed_is_refused(folder: Path, part: str, values: dict[str, Any], message: str) -> None:
    edit(folder, part, **values)
    with pytest.raises(ShapeError, match=message):
        ModelShape.from_hf(folder)


@pytest.mark.parametrize("section", [[6, 5, 5], [2, 9, 5], [10, 1, 5], [14, 1, 1]])
@pytest.mark.parametrize("factor", [None, 4.0])
def test_rotary_tables_are_those_of_transformers(folder: Path, section: list[int], factor: float | None) -> None:
    """Where a section has more pairs than places, Transformers leaves the rest of them to time."""
    edit(folder, "text_config.rope_scaling", mrope_section=section)
    if factor:
        stretch_positions(folder, factor)
    shape = ModelShape.from_hf(folder)
    positions = torch.randint(0, shape.max_positions, (3, 50), generator=torch.Generator().manual_seed(0))
    theirs = Qwen3VLTextRotaryEmbedding(AutoConfig.from_pretrained(folder).text_config)
    cosines, sines = theirs(torch.zeros(1), positions[:, None])
    rows = Qwen3VL.rotary_rows(None, shape)  # type: ignore[arg-type]
    frequencies, scaling = inverse_frequencies(shape)
    table = rotary_table(positions[rows].t().float() * frequencies, torch.float32, scaling)
    torch.testing.assert_close(table[:, 0, 0], torch.cat((cosines[0], sines[0]), -1), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 14), (6, 8), (28, 4), (48, 48), (50, 96)])
@pytest.mark.parametrize("side", [7, 48])
def test_learned_positions_are_interpolated_as_in_transformers(height: int, width: int, side: int) -> None:
    layout = frame_layout(height, width, 2, side)
    corners, shares = get_vision_interpolation_indices_and_weights(
        torch.tensor([[1, height, width]]), side, align_corners=True, spatial_merge_size=2
    )
    dense = torch.zeros(2, height * width, side * side)
    for index, (places, weights) in enumerate(
        ((torch.from_numpy(layout.corners), torch.from_numpy(layout.shares)), (corners, shares))
    ):
        dense[index].scatter_add_(1, places, weights.float())
    torch.testing.assert_close(dense[0], dense[1], rtol=0, atol=1e-5)


def test_positions_are_those_that_vllm_serves(folder: Path) -> None:
    shape = ModelShape.from_hf(folder)
    config = AutoConfig.from_pretrained(folder)
    draw = random.Random(3)
    for _ in range(40):
        tokens = [0] * draw.randint(1, 5)
        segments: list[int | Visual] = [len(tokens)]
        features = []
        for _ in range(draw.randint(1, 4)):
            height, width = 2 * draw.randint(1, 6), 2 * draw.randint(1, 6)
            visual = Visual((1, height, width))
            if draw.random() < 0.5:
                slices = draw.randint(1, 4)
                visual = Visual((slices, height, width), 1.0, tuple(float(i) for i in range(slices)))
            kind = "image" if visual.seconds is None else "video"
            expansion = expand(visual, shape, lambda text: [0] * draw.randint(1, 9))
            data = {f"{kind}_grid_thw": SimpleNamespace(data=torch.tensor(visual.grid))}
            offset = len(tokens) + 1
            features.append(SimpleNamespace(modality=kind, data=data, mm_position=SimpleNamespace(offset=offset)))
            tokens += [shape.vision_start_token, *expansion.tokens, shape.vision_end_token, 0]
            segments += [1, *expansion.segments, 2]
        expected, delta = Qwen3VLForConditionalGeneration._get_mrope_input_positions(tokens, features, config)
        positions = family_of(shape).positions(merge_text_lengths(segments), shape, "extent")
        np.testing.assert_array_equal(positions, expected.numpy())
        assert delta == positions.max() + 1 - len(tokens)
