"""What the scripts in examples/ refuse before they train."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ovr_megatron.model.tiny import make_tiny_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The project with this environment as its own."""
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copytree(ROOT / "examples", folder / "examples")
    for name in ("tools", "ovr_megatron"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def run(script: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", script, *map(str, arguments)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_folder_with_a_model_of_another_family_is_refused(project: Path, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "init")
    done = run(project / "examples/miniature.sh", tmp_path, FAMILY="qwen3_vl")
    assert done.returncode == 2
    assert f"{tmp_path} has a model of another family than FAMILY=qwen3_vl; give another folder" in done.stderr
    assert not (tmp_path / "base").exists()


def test_distillation_without_a_teacher_shows_its_usage(tmp_path: Path) -> None:
    done = run(ROOT / "examples/distillation.sh", tmp_path)
    assert done.returncode == 2
    for word in ("RUN_DIR TEACHER", "SEED", "STEPS", "ITERATIONS", "PROBLEMS", "PROCESSES", "step_001000"):
        assert word in done.stderr
    assert "set -euo" not in done.stderr
