"""A model of some of another's layers, against Transformers with its other layers taken out."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from ovr_megatron.checkpoint.conversion import import_hf
from ovr_megatron.config import ConfigError
from ovr_megatron.families import ModelShape
from ovr_megatron.model.tiny import make_tiny_model


def load(folder: Path) -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def test_selected_layers_compute_what_the_model_does_without_the_others(tmp_path: Path) -> None:
    whole = make_tiny_model(tmp_path / "whole", tied=False, perturb=True, seed=3)
    import_hf(whole, tmp_path / "half", workers=1, force=False, yarn=None, layers=[0, 3])
    folder = tmp_path / "half/policy"
    assert ModelShape.from_hf(folder).layers == 2
    model = load(whole)
    decoder = model.model.language_model
    decoder.layers = torch.nn.ModuleList([decoder.layers[0], decoder.layers[3]])
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
        logits = load(folder)(input_ids=tokens, use_cache=False).logits
        other = load(whole)(input_ids=tokens, use_cache=False).logits
    assert torch.equal(logits, expected)
    assert not torch.allclose(logits, other)


@pytest.mark.parametrize("layers", [[], [3, 0], [1, 1], [0, 4], [-1]])
def test_layers_that_are_not_there_are_refused(tmp_path: Path, layers: list[int]) -> None:
    whole = make_tiny_model(tmp_path / "whole", seed=3)
    with pytest.raises(ConfigError, match="give numbers of 0 to 3, ascending"):
        import_hf(whole, tmp_path / "half", workers=1, force=False, yarn=None, layers=layers)
    assert not (tmp_path / "half").exists()


def test_layers_with_features_of_the_tower_stay_where_they_are(tmp_path: Path) -> None:
    whole = make_tiny_model(tmp_path / "whole", seed=3, family="qwen3_vl")
    features = ModelShape.from_hf(whole).vision.layer_features
    assert features > 1
    with pytest.raises(
        ConfigError, match=rf"the first {features} layers of this model take features .*; begin with 0,1"
    ):
        import_hf(whole, tmp_path / "half", workers=1, force=False, yarn=None, layers=[0, 2, 3])
    assert not (tmp_path / "half").exists()
