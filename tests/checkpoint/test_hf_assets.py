"""The files beside the weights of a run's checkpoints and exports, read by Transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

from ovr_megatron.checkpoint.hf_assets import write_hf_assets
from ovr_megatron.config import DataConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.model.tiny import TinySizes, make_tiny_model

SIZES = TinySizes(hidden=32, layers=1, ffn=32, vision_hidden=32, vision_heads=2, vision_ffn=32, vision_depth=1)
BASE = '{"do_sample": true, "repetition_penalty": 1.05, "temperature": 0.1, "top_p": 0.8, "top_k": 20}\n'


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model whose generation config is in the manner of the published ones."""
    folder = make_tiny_model(tmp_path / "base", sizes=SIZES)
    (folder / "generation_config.json").write_text(BASE)
    return folder


def test_transformers_generates_the_trained_distribution_of_an_export(base: Path, tmp_path: Path) -> None:
    export = tmp_path / "export"
    processor = Processor(base, DataConfig())
    for _ in range(2):  # a run that is resumed writes them again
        write_hf_assets(export, processor)
    shutil.copy(base / "model.safetensors", export)
    settings = GenerationConfig.from_pretrained(export)
    assert (settings.do_sample, settings.temperature, settings.top_p, settings.top_k) == (True, 1.0, 1.0, 0)
    assert settings.repetition_penalty == 1.0
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(export)
    ids = torch.tensor([[5, 6, 5, 6, 5]])
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    out = model.generate(ids, **options)
    assert all(torch.equal(score, logits) for score, logits in zip(out.scores, out.logits, strict=True))
    end = processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert (settings.eos_token_id, settings.pad_token_id) == (end, end[1])


def test_the_base_models_generation_config_stays_beside_it(base: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "cold", tmp_path / "rl"
    write_hf_assets(first, Processor(base, DataConfig()))
    write_hf_assets(second, Processor(first, DataConfig()))
    assert (second / "generation_config.base.json").read_text() == BASE
    assert (second / "generation_config.json").read_text() == (first / "generation_config.json").read_text() != BASE


@pytest.mark.parametrize("rule", ["grid", "extent"])
def test_the_rule_after_a_video_goes_with_the_export(base: Path, tmp_path: Path, rule: str) -> None:
    write_hf_assets(tmp_path / "export", Processor(base, DataConfig(after_video=rule)))
    assert json.loads((tmp_path / "export" / "config.json").read_text())["after_video"] == rule
    assert Processor(tmp_path / "export", DataConfig()).after_video == rule
    assert Processor(tmp_path / "export", DataConfig(after_video="grid")).after_video == "grid"
