import random

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from ovr_megatron.data.processing import continue_positions
from ovr_megatron.families.positions import Visual
from ovr_megatron.families.qwen2_5_vl.positions import mrope_positions
from ovr_megatron.model.tiny import TinySizes, make_tiny_model

MERGE, TOKENS_PER_SECOND = 2, 2


@pytest.fixture(scope="module")
def transformers_model(tmp_path_factory):
    sizes = TinySizes(layers=1, hidden=64, heads=2, kv_heads=1, ffn=64, vision_hidden=32, vision_ffn=32)
    folder = make_tiny_model(tmp_path_factory.mktemp("model"), sizes=sizes)
    return Qwen2_5_VLModel(AutoConfig.from_pretrained(folder))


def transformers_positions(model, segments):
    kinds = []
    for segment in segments:
        if isinstance(segment, Visual):
            kinds += [1 if segment.seconds is None else 2] * segment.features(MERGE)
        else:
            kinds += [0] * segment
    visuals = [segment for segment in segments if isinstance(segment, Visual)]
    images = [v.grid for v in visuals if v.seconds is None]
    videos = [v for v in visuals if v.seconds is not None]
    positions, _ = model.get_rope_index(
        torch.zeros(1, len(kinds), dtype=torch.long),
        torch.tensor([kinds]),
        image_grid_thw=torch.tensor(images) if images else None,
        video_grid_thw=torch.tensor([v.grid for v in videos]) if videos else None,
        second_per_grid_ts=torch.tensor([v.seconds for v in videos]) if videos else None,
    )
    return positions[:, 0].numpy()


@pytest.mark.parametrize(
    "segments",
    [
        [7],
        [3, Visual((1, 4, 6)), 5],
        [1, Visual((1, 2, 2)), 2, Visual((1, 8, 2)), 2, Visual((1, 4, 4)), 9],
        [4, Visual((3, 4, 4), seconds=1.0), 6],
        [4, Visual((2, 4, 8), seconds=2 / 3), 2, Visual((1, 4, 4)), 2, Visual((5, 2, 2), seconds=2 / 0.7), 3],
    ],
    ids=["text", "image", "images", "video", "mixed"],
)
def test_positions_are_those_of_transformers(transformers_model, segments):
    expected = transformers_positions(transformers_model, segments)
    found = mrope_positions(segments, MERGE, TOKENS_PER_SECOND)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, expected)


def test_random_documents_have_the_positions_of_transformers(transformers_model):
    draw = random.Random(5)
    for _ in range(60):
        segments = [draw.randint(1, 9)]
        for _ in range(draw.randint(1, 4)):
            height, width = 2 * draw.randint(1, 6), 2 * draw.randint(1, 6)
            moving = draw.random() < 0.5
            frames, seconds = (
                (draw.randint(1, 9), 2 / draw.choice([0.3, 0.7, 1.0, 2.0, 3.0, 23.976])) if moving else (1, None)
            )
            segments += [Visual((frames, height, width), seconds), draw.randint(1, 9)]
        expected = transformers_positions(transformers_model, segments)
        np.testing.assert_array_equal(
            mrope_positions(segments, MERGE, TOKENS_PER_SECOND), expected, err_msg=str(segments)
        )


def test_a_long_video_ends_where_the_rule_says():
    segments = [3, Visual((4, 4, 4), seconds=1.0), 2]
    time = [0, 1, 2, *np.repeat([3, 5, 7, 9], 4)]
    grid = mrope_positions(segments, MERGE, TOKENS_PER_SECOND, after_video="grid")
    extent = mrope_positions(segments, MERGE, TOKENS_PER_SECOND, after_video="extent")
    assert grid[0].tolist() == [*time, 5, 6]
    assert extent[0].tolist() == [*time, 10, 11]
    assert extent[1].tolist() == [0, 1, 2, *[3, 3, 4, 4] * 4, 10, 11]
    assert extent[2].tolist() == [0, 1, 2, *[3, 4, 3, 4] * 4, 10, 11]


def test_both_rules_agree_on_images():
    segments = [3, Visual((1, 4, 8)), 2, Visual((1, 6, 2)), 4]
    np.testing.assert_array_equal(
        mrope_positions(segments, MERGE, TOKENS_PER_SECOND, "grid"),
        mrope_positions(segments, MERGE, TOKENS_PER_SECOND, "extent"),
    )


def test_a_response_continues_the_prompt(transformers_model):
    prompt = [3, Visual((6, 4, 6), seconds=1.0), 2]
    expected = transformers_positions(transformers_model, [*prompt[:-1], prompt[-1] + 5])
    before = mrope_positions(prompt, MERGE, TOKENS_PER_SECOND)
    np.testing.assert_array_equal(np.concatenate([before, continue_positions(before, 5)], axis=1), expected)
