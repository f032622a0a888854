"""Every layout computes what one process and what Transformers compute: one launch of four processes, one table."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from ovr_megatron.config import ConfigError, ParallelConfig
from ovr_megatron.families import ModelShape, family_of
from ovr_megatron.model.layout import alignment, check_layout
from ovr_megatron.model.tiny import TinySizes, make_tiny_model
from ovr_megatron.model.tiny_tokenizer import CORPUS, write_tokenizer
from ovr_megatron.plan.report import read_shape
from tests.model.matrix import WHOLE
from tests.ranks import launch

ROOT = Path(__file__).resolve().parents[2]
BOUNDS = {"outputs": 1e-4, "gradients": 1e-4, "loss": 1e-6, "one process": 2e-5, "steps": 1e-3}
BF16_BOUNDS = {"outputs": 3e-2, "gradients": 1e-1, "loss": 1e-2}


OTHER_SIZES = {
    "8 heads of 32": TinySizes(hidden=256, heads=8, kv_heads=4, layers=2, vision_depth=3),
    "one vision layer": TinySizes(layers=2, vision_depth=1, vision_heads=2, window=112),
}


def make_odd_qwen3_vl(folder: Path) -> None:
    """Patches of 10 pixels merged 3 x 3, one frame each, features of a first and a last block, odd sections."""
    folder.mkdir()
    ids = write_tokenizer(folder, CORPUS, bpe_vocab=290, max_length=512, family=family_of("qwen3_vl"))
    config = Qwen3VLConfig(
        text_config={
            "hidden_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "intermediate_size": 112,
            "vocab_size": 333,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e4,
                "mrope_section": [5, 3, 4],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 3,
            "hidden_size": 48,
            "intermediate_size": 56,
            "num_heads": 4,
            "out_hidden_size": 96,
            "patch_size": 10,
            "spatial_merge_size": 3,
            "temporal_patch_size": 1,
            "num_position_embeddings": 25,
            "deepstack_visual_indexes": [0, 2],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    Qwen2VLImageProcessor(patch_size=10, merge_size=3, temporal_patch_size=1).save_pretrained(folder)


def make_odd_qwen2_5_vl(folder: Path) -> None:
    """Patches of 10 pixels merged 3 x 3, one frame each, windows of 2 features, full attention first, odd sections."""
    folder.mkdir()
    ids = write_tokenizer(folder, CORPUS, bpe_vocab=290, max_length=512)
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "intermediate_size": 112,
            "vocab_size": 333,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e4, "mrope_section": [4, 1, 3]},
        },
        vision_config={
            "depth": 3,
            "hidden_size": 48,
            "intermediate_size": 56,
            "num_heads": 4,
            "out_hidden_size": 96,
            "patch_size": 10,
            "spatial_merge_size": 3,
            "temporal_patch_size": 1,
            "window_size": 60,
            "fullatt_block_indexes": [0, 2],
            "tokens_per_second": 4,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    Qwen2VLImageProcessor(patch_size=10, merge_size=3, temporal_patch_size=1).save_pretrained(folder)


ODD_MODELS = {"qwen2_5_vl": make_odd_qwen2_5_vl, "qwen3_vl": make_odd_qwen3_vl}


def compute(folder: Path, family: str) -> dict[str, Any]:
    """The matrix of a family; one whose first layers take features needs two layers in each part of a pipeline."""
    sizes = TinySizes() if family_of(family).is_default else TinySizes(layers=8)
    for tied in (True, False):
        name = "tied" if tied else "untied"
        make_tiny_model(folder / name, tied=tied, seed=5, perturb=True, sizes=sizes, family=family)
    if family_of(family).is_default:
        for name, other_sizes in OTHER_SIZES.items():
            make_tiny_model(folder / name, tied=False, seed=2, perturb=True, sizes=other_sizes)
    ODD_MODELS[family](folder / "odd sizes")
    launch(ROOT / "tests/model/layouts.py", folder, folder, family, ranks=4)
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return compute(tmp_path_factory.mktemp("layouts"), "qwen2_5_vl")


@pytest.fixture(scope="module")
def further_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return compute(tmp_path_factory.mktemp("layouts"), "qwen3_vl")


def rows(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    table = {f"{model}, {layout}": row for model, part in results["matrix"].items() for layout, row in part.items()}
    return table | results["side by side"] | results["other shapes"]


def check(results: dict[str, Any], count: int) -> None:
    columns = list(BOUNDS)
    print(f"\n{'largest relative error':44}" + "".join(f"{column:>13}" for column in columns))
    wrong = []
    for name, row in rows(results).items():
        cells = "".join(f"{row[column]:13.1e}" if column in row else " " * 13 for column in columns)
        print(f"{name:44}{cells}")
        bounds = BF16_BOUNDS if "bf16" in name else BOUNDS
        wrong += [(name, c, row[c]) for c, bound in bounds.items() if c in row and not row[c] <= bound]
    assert not wrong
    assert len(rows(results)) == count


def test_every_layout_computes_what_transformers_computes(results: dict[str, Any]) -> None:
    check(results, 60 if WHOLE else 34)


def test_every_layout_of_a_further_family_computes_what_transformers_computes(further_results: dict[str, Any]) -> None:
    check(further_results, 56 if WHOLE else 16)
    checked = [row["replicas agree"] for row in rows(further_results).values() if "steps" in row]
    assert len(checked) == (17 if WHOLE else 5) and all(checked)
    assert max(further_results["packed"].values()) < 1e-5


def test_what_is_frozen_has_no_gradient(results: dict[str, Any]) -> None:
    table = results["matrix"]["untied policy"]
    counts = {name: row["trained"] for name, row in table.items()}
    everything = counts["dp=4"]
    assert counts["frozen vision"] + counts["frozen language, cp=2"] == everything
    assert counts["frozen vision, zero=1, pp=2"] == counts["frozen vision"]


def test_replicas_stay_bit_identical(results: dict[str, Any]) -> None:
    checked = [row["replicas agree"] for row in results["matrix"]["untied policy"].values() if "steps" in row]
    assert len(checked) > (15 if WHOLE else 8) and all(checked)


def test_shared_prompts_change_nothing_but_the_work(results: dict[str, Any], further_results: dict[str, Any]) -> None:
    assert len(results["shared prompts"]) == 6
    further = {f"further {name}": differences for name, differences in further_results["shared prompts"].items()}
    assert len(further) == (6 if WHOLE else 2)
    for name, differences in (results["shared prompts"] | further).items():
        assert differences["scores"] < 1e-5, name
        assert differences["loss"] < 1e-6, name
        assert differences["gradients"] < 2e-5, name
        assert differences["rows"] < 0.7, name


def test_a_pack_is_its_documents(results: dict[str, Any]) -> None:
    print(results["packed"])
    assert max(results["packed"].values()) < 1e-5


def test_a_checkpoint_knows_no_layout(results: dict[str, Any]) -> None:
    for losses in results["resumed"].values():
        written, same, *others = losses
        assert same == written
        for other in others:
            assert other[0] == pytest.approx(written[0], rel=1e-6)
            assert other == pytest.approx(written, rel=1e-5)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"tp": 4}, "parallel.tp=4 does not divide the model's 2 key-value heads; use at most tp=2"),
        ({"pp": 3}, "parallel.pp=3, parallel.vpp=1: 4 of the model's 4 layers do not divide"),
        ({"pp": 3}, "pp can be 1, 2, 4"),
        ({"pp": 2, "vpp": 4}, "parallel.vpp=4.*lower vpp$"),
        ({"pp": 8}, "4 layers do not divide over 8 stages"),
        ({"pp": 2, "first_stage_layers": 1, "last_stage_layers": 1}, "hold 2 layers and the model has 4"),
        ({"pp": 2, "first_stage_layers": 4}, "0 of the model's 4 layers"),
        ({"pp": 2, "vpp": 2, "last_stage_layers": 1}, "do not divide"),
    ],
)
def test_an_impossible_layout_is_refused(tmp_path: Path, parallel: dict[str, int], message: str) -> None:
    make_tiny_model(tmp_path, tied=True, seed=1)
    with pytest.raises(ConfigError, match=message):
        check_layout(ModelShape.from_hf(tmp_path), ParallelConfig(**parallel))


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"pp": 4}, "added to the first 2 layers, and the first part .* has 1; without uneven stages pp can be 1, 2$"),
        ({"pp": 2, "vpp": 2}, "first part of the first stage has 1; lower vpp$"),
        ({"pp": 2, "first_stage_layers": 1, "last_stage_layers": 3}, "first part of the first stage has 1"),
    ],
)
def test_layers_that_take_features_stay_in_the_first_part(
    tmp_path: Path, parallel: dict[str, int], message: str
) -> None:
    shape = ModelShape.from_hf(make_tiny_model(tmp_path, seed=1, family="qwen3_vl"))
    check_layout(shape, ParallelConfig(pp=2))
    check_layout(shape, ParallelConfig(pp=2, first_stage_layers=3, last_stage_layers=1))
    with pytest.raises(ConfigError, match=message):
        check_layout(shape, ParallelConfig(**parallel))


@pytest.mark.parametrize(
    ("preset", "parallel"),
    [
        ("Qwen3-VL-8B", {"pp": 18}),
        ("Qwen3-VL-8B", {"pp": 9, "vpp": 2}),
        ("Qwen3-VL-8B", {"pp": 5, "vpp": 3}),
        ("Qwen3-VL-4B", {"pp": 2, "first_stage_layers": 2, "last_stage_layers": 34}),
        ("7B", {"pp": 9, "vpp": 2}),
    ],
)
def test_the_pipelines_of_a_refusal_are_taken(preset: str, parallel: dict[str, int]) -> None:
    shape, _ = read_shape(preset)
    with pytest.raises(ConfigError, match="pp can be") as error:
        check_layout(shape, ParallelConfig(**parallel))
    sizes = str(error.value).rpartition("pp can be ")[2].split(", ")
    for size in sizes:
        check_layout(shape, ParallelConfig(pp=int(size), vpp=parallel.get("vpp", 1)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vpp": 2}, "parallel.vpp=2 needs parallel.pp of at least 2"),
        ({"first_stage_layers": 2}, "needs parallel.pp"),
        ({"first_stage_layers": -1}, "parallel.first_stage_layers=-1"),
        ({"cp": 0}, "parallel.cp=0"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**settings)


def test_alignment() -> None:
    assert alignment(ParallelConfig(tp=2)) == (1, 1)
    assert alignment(ParallelConfig(tp=4, sequence_parallel=True)) == (1, 4)
    assert alignment(ParallelConfig(cp=4)) == (8, 8)
    assert alignment(ParallelConfig(cp=4, tp=2, sequence_parallel=True)) == (8, 8)
    assert alignment(ParallelConfig(cp=3, tp=2, sequence_parallel=True)) == (6, 6)
    assert alignment(ParallelConfig(cp=2, tp=2), "current") == (4, 32)
    assert alignment(ParallelConfig(cp=2, tp=4, sequence_parallel=True), "block") == (4, 1024)
