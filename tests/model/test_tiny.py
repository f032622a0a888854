import json
import runpy
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoProcessor, Qwen2_5_VLForConditionalGeneration, Qwen2TokenizerFast

from ovr_megatron.families import ModelShape
from ovr_megatron.families.qwen2_5_vl.tiny import SPECIAL_TOKENS
from ovr_megatron.model.tiny import TinySizes, make_tiny_model

TOOL = str(Path(__file__).resolve().parents[2] / "tools/make_tiny_model.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), seed=3, perturb=True)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_every_weight_and_no_other(tmp_path, tied):
    make_tiny_model(tmp_path, tied=tied)
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


def test_weights_arrive_unchanged_in_transformers(folder):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(model.model.visual.blocks[1].attn.qkv.bias, stored["visual.blocks.1.attn.qkv.bias"])
    assert torch.equal(model.model.language_model.norm.weight, stored["model.norm.weight"])


def test_both_readers_find_the_same_shape(folder):
    shape, config = ModelShape.from_hf(folder), AutoConfig.from_pretrained(folder)
    text, vision = config.text_config, config.vision_config
    assert (shape.layers, shape.hidden, shape.ffn) == (4, 128, 384)
    assert (text.num_hidden_layers, text.hidden_size, text.intermediate_size) == (4, 128, 384)
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (text.num_attention_heads, text.num_key_value_heads, 32)
    assert shape.rope_theta == text.rope_parameters["rope_theta"] == 1e4
    assert list(shape.mrope_section) == text.rope_parameters["mrope_section"] == [4, 6, 6]
    assert shape.tied == config.tie_word_embeddings is True
    assert (shape.vision.hidden, shape.vision.depth, shape.vision.heads) == (96, 2, 4)
    assert (vision.hidden_size, vision.depth, vision.num_heads) == (96, 2, 4)
    assert list(shape.vision.full_attention_layers) == vision.fullatt_block_indexes == [1]
    assert shape.image_token == config.image_token_id


def test_the_processor_of_transformers_reads_the_folder(folder):
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    image = PIL.Image.fromarray(np.full((56, 84, 3), 7, np.uint8))
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Add the red digits."}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Add the red digits.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    batch = processor(text=[text], images=[image], return_tensors="pt")
    assert batch["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert (batch["input_ids"] == ModelShape.from_hf(folder).image_token).sum() == 6
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    assert torch.isfinite(model(**batch).logits).all()


def test_the_tokenizer_knows_qwens_tokens_and_the_puzzles_words(folder):
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    assert isinstance(tokenizer, Qwen2TokenizerFast)
    assert len({tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}) == len(SPECIAL_TOKENS)
    assert all(len(tokenizer.encode(token)) == 1 for token in SPECIAL_TOKENS)
    assert tokenizer.tokenize("List: red3 green15") == ["List", ":", "Ġred", "3", "Ġgreen", "1", "5"]
    for text in ("naïve ½ \t\n 漢字", "So \\boxed{8}</think>\n\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_past_the_tokenizer_exist_as_in_the_hubs_models(folder):
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    vocab = ModelShape.from_hf(folder).vocab
    assert vocab % 64 == 0
    assert len(tokenizer) < vocab


def test_perturbed_norms_and_biases_are_not_trivial(folder):
    weights = load_file(folder / "model.safetensors")
    vectors = {name: weight for name, weight in weights.items() if weight.ndim == 1}
    assert all(((weight != 0) & (weight != 1)).all() for weight in vectors.values())
    plain = load_file(make_tiny_model(folder.parent / "plain") / "model.safetensors")
    assert plain["model.norm.weight"].unique().tolist() == [1.0]
    assert plain["visual.merger.mlp.0.bias"].unique().tolist() == [0.0]


def test_the_same_arguments_write_the_same_bytes(tmp_path):
    sizes = TinySizes(layers=1)
    first, second = (make_tiny_model(tmp_path / name, seed=5, sizes=sizes) for name in "ab")
    other = make_tiny_model(tmp_path / "c", seed=6, sizes=sizes)
    names = sorted(path.name for path in first.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    assert [n for n in names if (first / n).read_bytes() != (other / n).read_bytes()] == ["model.safetensors"]


def test_a_corpus_of_ones_own_is_learnt(tmp_path):
    make_tiny_model(tmp_path, sizes=TinySizes(layers=1), corpus=["quokka quokka quokka"])
    tokenizer = AutoProcessor.from_pretrained(tmp_path).tokenizer
    assert tokenizer.tokenize("quokka") == ["quokka"]
    assert len(tokenizer.tokenize("helpful")) > 1


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="vision_hidden=100 must be a multiple of its 4 heads"):
        TinySizes(vision_hidden=100)
    with pytest.raises(ValueError, match="kv_heads=3"):
        TinySizes(kv_heads=3)


def test_the_command_line_writes_a_model(tmp_path, monkeypatch, capsys):
    command = ["make_tiny_model.py", "--out", str(tmp_path), "--untied", "--layers", "2"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(TOOL, run_name="__main__")
    shape = ModelShape.from_hf(tmp_path)
    assert (shape.layers, shape.tied) == (2, False)
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 128

    other = [*command, "--out", str(tmp_path / "other"), "--heads", "5"]
    monkeypatch.setattr(sys, "argv", other)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(TOOL, run_name="__main__")
    assert "hidden=128 must be a multiple of its 5 heads" in capsys.readouterr().err
