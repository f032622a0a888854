"""Our model against Transformers': logits and gradients of text, image, three images and video."""

import json
import subprocess
from pathlib import Path

import pytest

from ovr_megatron.model.tiny import make_tiny_model


def verify(python: Path, folder: Path, *options: str) -> tuple[int, dict]:
    command = [python, "-m", "ovr_megatron", "verify", "--hf", folder, "--json", *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode in (0, 1), result.stderr[-3000:]
    return result.returncode, json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(("tied", "options"), [(True, ()), (False, ("--layout", "tp=2"))], ids=["tied", "untied-tp2"])
def test_logits_and_gradients_are_transformers(
    loaded_python: Path, tmp_path: Path, tied: bool, options: tuple[str, ...]
) -> None:
    make_tiny_model(tmp_path / "model", tied=tied, seed=3, perturb=True)
    code, report = verify(loaded_python, tmp_path / "model", *options)
    print({name: f"{value:.1e}" for name, value in report["logits"].items()})
    assert code == 0 and report["passed"]
    assert set(report["logits"]) == {"text", "image", "images", "video"}
    assert max(report["logits"].values()) <= 1e-4
    assert max(report["gradients"].values()) <= 1e-4
    assert any(name.startswith("visual.") for name in report["gradients"])


def test_another_models_weights_do_not_pass(loaded_python: Path, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "a", tied=True, seed=3)
    make_tiny_model(tmp_path / "b", tied=True, seed=4)
    code, report = verify(loaded_python, tmp_path / "a", "--checkpoint", str(tmp_path / "b"))
    assert code == 1 and not report["passed"]
