"""What vLLM makes of an export by itself: its sampling defaults and its positions, by its own functions."""

import json
import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.config import ModelConfig
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.sampling_params import SamplingParams

from ovr_megatron.checkpoint.hf_assets import write_hf_assets
from ovr_megatron.config import DataConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.families.positions import Visual
from ovr_megatron.families.qwen2_5_vl.positions import mrope_positions
from ovr_megatron.model.tiny import TinySizes, make_tiny_model

MERGE = TOKENS_PER_SECOND = 2
# What Qwen's own file of this name asks for.
BASE = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.1, "top_p": 0.001, "top_k": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = TinySizes(hidden=32, layers=1, ffn=32, vision_hidden=32, vision_heads=2, vision_ffn=32, vision_depth=1)
    folder = make_tiny_model(tmp_path_factory.mktemp("base"), sizes=sizes)
    (folder / "generation_config.json").write_text(json.dumps(BASE))
    return folder


def test_vllm_samples_the_trained_distribution_by_default(folder: Path, tmp_path: Path) -> None:
    assert ModelConfig(model=str(folder)).get_diff_sampling_param()["top_k"] == 1
    write_hf_assets(tmp_path, Processor(folder, DataConfig()))
    served = ModelConfig(model=str(tmp_path))
    plain = SamplingParams()
    assert repr(SamplingParams(**served.get_diff_sampling_param())) == repr(plain)
    vocabulary = Processor(tmp_path, DataConfig()).tokenizer.get_vocab()
    assert served.try_get_generation_config()["eos_token_id"] == [vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"]]


def positions_of_vllm(segments: list[int | Visual]) -> np.ndarray:
    """`get_mrope_input_positions` of the class that vLLM serves with, which needs nothing of a model but its config."""
    vision = SimpleNamespace(spatial_merge_size=MERGE, tokens_per_second=TOKENS_PER_SECOND)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    model.iter_mm_grid_thw = partial(Qwen2_5_VLForConditionalGeneration.iter_mm_grid_thw, model)
    features, length = [], 0
    for segment in segments:
        if isinstance(segment, int):
            length += segment
            continue
        kind = "image" if segment.seconds is None else "video"
        data = {f"{kind}_grid_thw": SimpleNamespace(data=torch.tensor(segment.grid))}
        if segment.seconds is not None:
            data["second_per_grid_ts"] = SimpleNamespace(data=torch.tensor(segment.seconds))
        features.append(SimpleNamespace(modality=kind, data=data, mm_position=SimpleNamespace(offset=length)))
        length += segment.features(MERGE)
    positions, delta = Qwen2_5_VLForConditionalGeneration.get_mrope_input_positions(model, [0] * length, features)
    assert delta == positions.max() + 1 - length
    return positions.numpy()


def test_positions_by_default_are_those_that_vllm_serves(folder: Path) -> None:
    rule = Processor(folder, DataConfig()).after_video
    draw = random.Random(7)
    differing = 0
    for _ in range(80):
        segments: list[int | Visual] = [draw.randint(1, 9)]
        for _ in range(draw.randint(1, 4)):
            grid = (1, 2 * draw.randint(1, 6), 2 * draw.randint(1, 6))
            video = Visual((draw.randint(1, 9), *grid[1:]), 2 / draw.choice([0.3, 0.7, 1.0, 2.0, 3.0, 23.976]))
            segments += [video if draw.random() < 0.5 else Visual(grid), draw.randint(1, 9)]
        expected = positions_of_vllm(segments)
        found = mrope_positions(segments, MERGE, TOKENS_PER_SECOND, rule)
        np.testing.assert_array_equal(found, expected, err_msg=str(segments))
        differing += not np.array_equal(mrope_positions(segments, MERGE, TOKENS_PER_SECOND, "grid"), expected)
    assert differing > 10  # the rule of Transformers 5 is another one
