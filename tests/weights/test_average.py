"""The uniform mean against exact rational arithmetic."""

import shutil
from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file, save_file

from ovr_megatron.model.tiny import TinySizes, make_tiny_model
from ovr_megatron.weights.average import average, mean
from ovr_megatron.weights.folder import WeightError
from ovr_megatron.weights.transfer import differences, same_bits

SIZES = TinySizes(hidden=32, layers=1, ffn=48, vision_hidden=32, vision_depth=1, vision_heads=2, vision_ffn=40)


def models(tmp_path, count=3, **arguments):
    return [
        make_tiny_model(tmp_path / f"hf{seed}", seed=seed, perturb=True, sizes=SIZES, **arguments)
        for seed in range(count)
    ]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_mean_of_three_models(tmp_path, tied):
    inputs = models(tmp_path, tied=tied)
    average(inputs, tmp_path / "mean")
    loaded = [load_file(path / "model.safetensors") for path in inputs]
    result = load_file(tmp_path / "mean" / "model.safetensors")
    assert result.keys() == loaded[0].keys()
    for name, tensor in result.items():
        exact = torch.stack([tensors[name] for tensors in loaded]).double().mean(0).float()
        assert same_bits(tensor, exact), name
    left = [line for line in differences(tmp_path / "mean", inputs[0]) if "values differ" not in line]
    assert left == []


def test_rounded_once_to_nearest():
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(50, generator=generator) for _ in range(7)]
    result = mean(inputs)
    for i, value in enumerate(result.tolist()):
        exact = sum(Fraction(tensor[i].item()) for tensor in inputs) / 7
        up, down = (torch.nextafter(result[i], torch.tensor(side)).item() for side in (float("inf"), -float("inf")))
        assert abs(Fraction(value) - exact) <= min(abs(Fraction(up) - exact), abs(Fraction(down) - exact))


def test_bfloat16_is_summed_wider():
    """256 + 1 + 1 + 1 + 1 stays 256 in bfloat16; the mean of five is 52."""
    inputs = [torch.tensor([value], dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0, 1.0, 1.0)]
    result = mean(inputs)
    assert result.dtype == torch.bfloat16
    assert result.item() == 52.0


def test_large_and_small_float32_are_summed_wider():
    inputs = [torch.tensor([value]) for value in (2.0**24, 1.0, 1.0, -(2.0**24))]
    assert mean(inputs).item() == 0.5


def test_more_numbers_than_are_summed_at_once(monkeypatch):
    monkeypatch.setattr("ovr_megatron.weights.average._PIECE", 4)
    a, b = torch.arange(10.0).view(5, 2), torch.ones(5, 2)
    assert torch.equal(mean([a, b]), (a + b) / 2)


def test_one_model_is_its_own_mean(tmp_path):
    (model,) = models(tmp_path, count=1, dtype=torch.bfloat16)
    average([model], tmp_path / "mean")
    assert differences(tmp_path / "mean", model) == []


def test_the_policy_of_checkpoints_is_taken(tmp_path):
    inputs = models(tmp_path, count=2)
    for number, path in enumerate(inputs):
        shutil.copytree(path, tmp_path / f"step_{number}" / "policy")
    average([tmp_path / "step_0", tmp_path / "step_1"], tmp_path / "a")
    average(inputs, tmp_path / "b")
    assert differences(tmp_path / "a", tmp_path / "b") == []


def test_models_of_different_shapes_are_refused(tmp_path):
    a = make_tiny_model(tmp_path / "a", sizes=SIZES)
    b = make_tiny_model(tmp_path / "b", sizes=TinySizes(hidden=32, layers=2, ffn=48))
    with pytest.raises(WeightError, match=r"of another model than .*layers is 2 instead of 1"):
        average([a, b], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_models_of_different_formats_are_refused(tmp_path):
    a = make_tiny_model(tmp_path / "a", sizes=SIZES)
    b = make_tiny_model(tmp_path / "b", sizes=SIZES, dtype=torch.bfloat16)
    with pytest.raises(WeightError, match=r"is BF16, but F32 in .*convert them to one format first"):
        average([a, b], tmp_path / "mean")


def test_a_damaged_model_is_refused(tmp_path):
    a, b = models(tmp_path, count=2)
    tensors = load_file(b / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, b / "model.safetensors")
    with pytest.raises(WeightError, match=r"hf1.*model\.norm\.weight"):
        average([a, b], tmp_path / "mean")


def test_nothing_to_average(tmp_path):
    with pytest.raises(WeightError, match="at least one"):
        average([], tmp_path / "mean")
