"""PuzzleVQA and MATH500 through PPO, MathVision testmini through evaluation, with a tiny model."""

import json
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


def test_three_ppo_iterations_on_puzzlevqa_and_math500(tmp_path: Path, model: Path) -> None:
    sources = f"[{{path: {DATA}/puzzlevqa, name: puzzlevqa}}, {{path: {DATA}/text/math500.json, name: math500}}]"
    run(
        *("-m", "ovr_megatron.rl", "--config-name", "tiny_rl", f"run.dir={tmp_path}", f"model.path={model}"),
        *(f"data.sources={sources}", "data.max_pixels=50176", "data.max_prompt_tokens=700", "data.pack_tokens=2048"),
        *("curriculum=[{until: 3, max_tokens: 760}]", "iterations=3", "prompts=6", "responses=2"),
        "algorithm.critic_warmup_iterations=0",
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics/train.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert max(line["rollout/mismatch_max"] for line in lines) <= 1e-4
    rows = [json.loads(line) for file in (tmp_path / "rollouts").glob("*.jsonl") for line in file.open()]
    assert len(rows) == 3 * 6 * 2
    assert {row["source"] for row in rows} == {"puzzlevqa", "math500"}
    assert any(row["image"] for row in rows if row["source"] == "puzzlevqa")


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
