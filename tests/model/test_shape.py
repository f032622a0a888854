"""Positions and YaRN as config.json has them: what is read, what is refused, what is written."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2_5_VLConfig

from ovr_megatron.config import ConfigError
from ovr_megatron.families import ModelShape
from ovr_megatron.families.config_json import ShapeError
from ovr_megatron.families.stretch import stretch_positions
from ovr_megatron.families.yarn import Yarn
from ovr_megatron.model.tiny import TinySizes, make_tiny_model

SIZES = TinySizes(layers=1, hidden=64, ffn=64, vision_hidden=32, vision_ffn=32, max_positions=1024)


@pytest.fixture(params=["flat", "nested"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The tiny model's config.json as Transformers 4 writes it, and as 5 does."""
    make_tiny_model(tmp_path, sizes=SIZES)
    if request.param == "nested":
        Qwen2_5_VLConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
        assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())["text_config"]
    return tmp_path


def edit(folder: Path, positions: int | None = None, **rope: Any) -> None:
    """Change the rotary part of config.json, and its positions."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    text = config.get("text_config") or config
    part = text.get("rope_scaling") or text["rope_parameters"]
    part.update(rope)
    text["max_position_embeddings"] = positions or text["max_position_embeddings"]
    path.write_text(json.dumps(config))


def yarn(**options: Any) -> dict[str, Any]:
    return {"type": "yarn", "rope_type": "yarn", "factor": 4.0, **options}


def test_without_yarn(folder: Path) -> None:
    shape = ModelShape.from_hf(folder)
    assert (shape.rope_theta, shape.mrope_section, shape.max_positions, shape.yarn) == (1e4, (2, 3, 3), 1024, None)


def test_yarn_is_read_with_its_defaults_and_without_them(folder: Path) -> None:
    edit(folder, 4096, **yarn(original_max_position_embeddings=1024))
    shape = ModelShape.from_hf(folder)
    assert (shape.max_positions, shape.trained_positions) == (4096, 1024)
    assert shape.yarn == Yarn(4.0, 1024, pytest.approx(1.1386294361119891))
    edit(folder, beta_fast=16, beta_slow=2.0, attention_factor=1.5, truncate=False)
    assert ModelShape.from_hf(folder).yarn == Yarn(4.0, 1024, 1.5, 16, 2.0, truncate=False)


@pytest.mark.parametrize(
    ("stored", "original", "expected"), [(128000, 32768, 128000), (200000, 32768, 131072), (32768, 32768, 32768)]
)
def test_positions_end_where_yarn_or_the_model_ends(folder: Path, stored: int, original: int, expected: int) -> None:
    edit(folder, stored, **yarn(original_max_position_embeddings=original))
    assert ModelShape.from_hf(folder).max_positions == expected


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"type": "linear", "rope_type": "linear", "factor": 2.0}, "rotary type 'linear' is not known"),
        (yarn(mscale=0.7), "field 'mscale' of YaRN is not known"),
        (yarn(factor="4"), "field 'factor' of YaRN is '4'"),
        (yarn(factor=0.5), "field 'factor' of YaRN is 0.5"),
        (yarn(beta_slow=0), "field 'beta_slow' of YaRN is 0"),
        (yarn(original_max_position_embeddings=None), "field 'original_max_position_embeddings' of YaRN is None"),
        ({"mrope_section": [2, 3, 4]}, r"mrope_section \[2, 3, 4\] is not three numbers of sum 8"),
    ],
)
def test_what_is_not_known_is_refused(folder: Path, rope: dict[str, Any], message: str) -> None:
    edit(folder, **rope)
    with pytest.raises(ShapeError, match=message) as caught:
        ModelShape.from_hf(folder)
    assert str(caught.value).startswith(f"{folder}/config.json: ")


def test_yarn_without_a_factor_is_refused(folder: Path) -> None:
    edit(folder, type="yarn", rope_type="yarn")
    with pytest.raises(ShapeError, match=r"field '[\w.]*factor' is missing"):
        ModelShape.from_hf(folder)


def test_stretched_positions_are_what_transformers_reads(folder: Path) -> None:
    before = json.loads((folder / "config.json").read_text())
    shape = stretch_positions(folder, 4)
    assert shape == ModelShape.from_hf(folder)
    assert (shape.max_positions, shape.trained_positions) == (4096, 1024)
    text = Qwen2_5_VLConfig.from_pretrained(folder).text_config
    assert text.max_position_embeddings == 4096
    rope = {name: value for name, value in text.rope_parameters.items() if name != "type"}
    assert rope == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "mrope_section": [2, 3, 3],
        "factor": 4,
        "original_max_position_embeddings": 1024,
    }
    after = json.loads((folder / "config.json").read_text())
    assert {name for name in before if before[name] != after[name]} <= {
        *("text_config", "rope_scaling", "max_position_embeddings")
    }
    assert stretch_positions(folder, 2.5).max_positions == 2560


def test_stretching_starts_where_training_ended(folder: Path) -> None:
    edit(folder, 128000)
    assert ModelShape.from_hf(folder).max_positions == 128000
    assert stretch_positions(folder, 4).max_positions == 131072


@pytest.mark.parametrize("factor", [1, 0.5, float("nan")])
def test_a_factor_that_stretches_nothing_is_refused(folder: Path, factor: float) -> None:
    with pytest.raises(ConfigError, match="gives no more positions; it must be above 1"):
        stretch_positions(folder, factor)


def test_a_length_past_the_positions_is_refused_with_the_factor_that_would_do(folder: Path) -> None:
    shape = ModelShape.from_hf(folder)
    shape.check_length(1024, "curriculum[0].max_tokens")
    with pytest.raises(ConfigError, match=r"max_tokens comes to 1025 .* has 1024 positions; .*--yarn 2$"):
        shape.check_length(1025, "curriculum[0].max_tokens")
    with pytest.raises(ConfigError, match=r"has 4096 positions; .*--yarn 5$"):
        stretch_positions(folder, 4).check_length(4097, "x")
