"""What the scripts in examples/ refuse before they train, and what the table of an experiment says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ovr_megatron.evaluation.judge_settings import JudgeConfig
from ovr_megatron.evaluation.judging import judge_behaviours
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


def test_the_table_of_behaviours_has_a_line_for_each_checkpoint(tmp_path: Path) -> None:
    seed_dir = tmp_path / "seed1"
    texts = [
        "I look: 3+4=7. So 34.",
        "I look: 3+4=7. Let me check. I look: sum 8. No match. Wait, I look again: 3+5=8. So 35.",
    ]
    files = {}
    for name in ("base", "cold_start", "rl", "direct_cold_start", "direct_rl"):
        scored = seed_dir / "eval" / name
        scored.mkdir(parents=True)
        shown = texts if name in ("cold_start", "rl") else texts[:1] * 2
        rows = [{"id": str(index), "question": "Q?", "response": text} for index, text in enumerate(shown)]
        for row in rows:
            row["correct"] = "Wait" in row["response"]
        files[name] = scored / "visual.responses.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
        for form in ("visual", "text"):
            greedy = {"accuracy": 0.25, "low": 0.2, "high": 0.3}
            (scored / f"{form}.json").write_text(json.dumps({"greedy": greedy}))
    judge_behaviours(files, [JudgeConfig()], seed_dir / "behaviours", 0, 0, False)
    done = subprocess.run(
        [sys.executable, ROOT / "examples/behaviours_table.py", tmp_path], capture_output=True, text=True, check=True
    )
    lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()]
    assert [line[1] for line in lines[2:]] == list(files)
    table = {line[1]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}
    assert table["rl"]["images right"] == "25.0 (20-30)"
    assert table["rl"]["visual reflection"] == "50.0 (9-91)"
    assert table["rl"]["right with backtracking"].startswith("100.0 (")
    assert table["rl"]["right without"].startswith("0.0 (")
    assert table["direct_rl"]["backtracking"].startswith("0.0 (")
    assert table["direct_rl"]["transfer of backtracking"] == "-"
