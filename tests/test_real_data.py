"""PuzzleVQA and MATH500 through PPO, MathVision testmini through evaluation, with a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ovr_megatron.model.tiny import make_tiny_model

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared/data"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")


def run(*command: object) -> str:
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real") / "model"
    make_tiny_model(folder, tied=False, seed=2)
    return folder


def test_the_example_of_real_problems_runs_from_end_to_end(tmp_path: Path) -> None:
    sources = ("puzzlevqa", "mathvision/testmini.jsonl", "text/math500.json")
    result = subprocess.run(
        ["bash", ROOT / "examples/real_data.sh", tmp_path, *(DATA / source for source in sources)],
        env=os.environ | {"ITERATIONS": "2"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    run = tmp_path / "rl"
    lines = [json.loads(line) for line in (run / "metrics/train.jsonl").read_text().splitlines()]
    assert [line["curriculum/max_tokens"] for line in lines] == [764, 828]
    assert max(line["rollout/mismatch_max"] for line in lines) <= 1e-4
    rows = [json.loads(line) for file in (run / "rollouts").glob("*.jsonl") for line in file.open()]
    assert len(rows) == 2 * 16 * 4
    assert {row["source"] for row in rows} == {"puzzlevqa", "mathvision", "math500"}
    assert any(row["image"] for row in rows if row["source"] == "puzzlevqa")
    assert "puzzlevqa" in (tmp_path / "report.html").read_text()


def test_mathvision_testmini_is_evaluated_whole(tmp_path: Path, model: Path) -> None:
    run(
        *("tools/evaluate.py", "--model", model, "--data", f"mathvision={DATA}/mathvision/testmini.jsonl"),
        *("--out", tmp_path, "--max-tokens", 8, "--max-pixels", 50176, "--template", "think"),
    )
    responses = (tmp_path / "mathvision.responses.jsonl").read_text().splitlines()
    result = json.loads((tmp_path / "mathvision.json").read_text())
    assert result["problems"] + result["dropped"] == 304
    assert len(responses) == result["problems"] >= 290
    assert 0 <= result["greedy"]["low"] <= result["greedy"]["accuracy"] <= result["greedy"]["high"] <= 1
