"""The table at the published sizes, on meta tensors, with Transformers' own models as the other side."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from ovr_megatron.families import ModelShape, family_of
from ovr_megatron.families.presets import presets, write_config
from ovr_megatron.weights.table import LayoutError, canonical, cut_dim, from_hf, join, padded_vocab, rows, split, to_hf

# Of bfloat16, as the hub's indices state them.
BYTES = {"7B": 16_584_333_312, "32B": 66_905_436_672, "Qwen3-VL-8B": 17_534_247_392}
TP = {"3B": [1, 2], "7B": [1, 2, 4], "32B": [1, 2, 4, 8], "72B": [1, 2, 4, 8]}
REFUSED = {"3B": (4, 2, "1, 2"), "7B": (8, 4, "1, 2, 4"), "32B": (16, 8, "1, 2, 4, 8"), "72B": (16, 8, "1, 2, 4, 8")}
TP |= {"Qwen3-VL-2B": [1, 2, 4, 8], "Qwen3-VL-4B": [1, 2, 4, 8], "Qwen3-VL-8B": [1, 2, 4, 8], "Qwen3-VL-32B": [1, 8]}
REFUSED |= {name: (16, 8, "1, 2, 4, 8") for name in TP if name.startswith("Qwen3")}
VISION_FIELDS = {
    "common": {("merge", "spatial_merge_size"), ("heads", "num_heads"), ("depth", "depth"), ("patch", "patch_size")},
    "qwen2_5_vl": {
        ("window", "window_size"),
        ("tokens_per_second", "tokens_per_second"),
        ("full_attention_layers", "fullatt_block_indexes"),
    },
    "qwen3_vl": {("deepstack_blocks", "deepstack_visual_indexes")},
}


@pytest.fixture(scope="module", params=presets())
def preset(request, tmp_path_factory):
    """A published model: its name, our shape, and the configuration that Transformers reads."""
    folder = write_config(request.param, tmp_path_factory.mktemp("preset")).parent
    return request.param, ModelShape.from_hf(folder), AutoConfig.from_pretrained(folder)


def meta(row):
    return [torch.empty(size, device="meta") for size in row.sizes]


def test_every_parameter_is_in_the_table_once_in_both_directions(preset):
    name, shape, config = preset
    with torch.device("meta"):
        model = family_of(shape).load_hf_class()(config)
    theirs = [(canonical(name), tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert len(theirs) == len(dict(theirs)), "two parameters have one name"
    assert ("lm_head.weight" in dict(theirs)) != shape.tied

    table = rows(shape)
    ours = [(name, size) for row in table for name, size in zip(row.hf, row.sizes, strict=True)]
    assert len(ours) == len(dict(ours)), "a Hugging Face tensor is in two rows"
    assert dict(ours) == dict(theirs)
    assert len({row.megatron for row in table}) == len(table), "a Megatron parameter is in two rows"
    count = sum(parameter.numel() for parameter in model.parameters())
    assert 2 * count == BYTES.get(name, 2 * count)


def test_transformers_and_we_read_the_same_configuration(preset):
    _, shape, config = preset
    text, vision = config.text_config, config.vision_config
    assert (shape.norm_eps, shape.max_positions) == (text.rms_norm_eps, text.max_position_embeddings)
    assert shape.rope_theta == text.rope_parameters["rope_theta"]
    assert list(shape.mrope_section) == text.rope_parameters["mrope_section"]
    assert shape.tied == config.tie_word_embeddings
    assert (shape.heads, shape.kv_heads) == (text.num_attention_heads, text.num_key_value_heads)
    assert (shape.image_token, shape.video_token) == (config.image_token_id, config.video_token_id)
    assert (shape.vision_start_token, shape.vision_end_token) == (151652, 151653)
    assert shape.head_dim == getattr(text, "head_dim", text.hidden_size // text.num_attention_heads)
    for ours, theirs in VISION_FIELDS["common"] | VISION_FIELDS[shape.family]:
        expected = getattr(vision, theirs)
        assert getattr(shape.vision, ours) == (tuple(expected) if isinstance(expected, list) else expected), theirs
    if shape.family == "qwen3_vl":
        assert shape.vision.positions_side**2 == vision.num_position_embeddings
        assert text.rope_parameters["mrope_interleaved"]


def test_shapes_there_and_back_for_every_tp(preset):
    name, published, _ = preset
    for shape in (published, replace(published, vocab=published.vocab - 1)):  # the second one needs padding
        for tp in TP[name]:
            for row in {(row.kind, row.sizes): row for row in rows(shape)}.values():  # the layers are all alike
                whole = from_hf(row, meta(row), shape)
                shards = [split(row, whole, tp, rank, shape) for rank in range(tp)]
                expected = list(whole.shape)
                if (dim := cut_dim(row)) is not None:
                    expected[dim] = (padded_vocab(shape, tp) if row.kind == "vocabulary" else expected[dim]) // tp
                assert [list(shard.shape) for shard in shards] == [expected] * tp, row.megatron
                joined = join(row, shards, shape)
                assert joined.shape == whole.shape, row.megatron
                assert [tuple(tensor.shape) for tensor in to_hf(row, joined, shape)] == list(row.sizes), row.megatron


def test_a_larger_tp_is_refused_with_the_reason(preset):
    name, shape, _ = preset
    tp, heads, fits = REFUSED[name]
    row = next(row for row in rows(shape) if row.kind == "qkv")
    with pytest.raises(LayoutError, match=rf"tp={tp} does not divide the {heads} key-value heads; tp can be {fits}$"):
        split(row, from_hf(row, meta(row), shape), tp, 0, shape)


def test_another_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'8B' is no Qwen2\.5-VL or Qwen3-VL; choose one of 3B, 7B, .*, Qwen3-VL-2B"):
        write_config("8B", tmp_path)
