"""PuzzleVQA and MATH500 through PPO, MathVision testmini through evaluation, with a tiny model."""

import json
import os
import signal
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


LIMIT = 200
SETS = {"aime2024": 30, "mathvision_testmini": LIMIT, "math500": LIMIT}
STORED = 100  # responses of math500 that the killed process has written
# `ovr evaluate`, which kills itself at a count of responses: another process would have to meet the moment by polling.
KILLED = f"""
import os, signal
from ovr_megatron.evaluation.command import main
from ovr_megatron.evaluation.response_cache import ResponseCache
from ovr_megatron.runtime.command import run_command

add, responses = ResponseCache.add, []

def add_or_die(self, *response):
    add(self, *response)
    if self._journal is not None and self._journal.path.name.startswith(".math500."):
        responses.append(response)
    if len(responses) == {STORED}:
        os.kill(os.getpid(), signal.SIGKILL)

ResponseCache.add = add_or_die
run_command(main)
"""


def test_benchmarks_are_evaluated_whole_though_killed_on_the_way(tmp_path: Path, model: Path) -> None:
    files = {"aime2024": "text/aime2024.json", "mathvision_testmini": "mathvision/testmini.jsonl"}
    files["math500"] = "text/math500.json"
    arguments = ["--model", model, "--out", tmp_path, "--max-tokens", 8, "--max-pixels", 50176]
    arguments += ["--template", "think", "--threads", 1, "--limit", LIMIT]
    for name in SETS:
        arguments += ["--data", f"{name}={DATA / files[name]}"]
    command = [sys.executable, "-c", KILLED, *map(str, arguments)]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-4000:]
    assert not (tmp_path / "math500.json").exists()
    [journal] = tmp_path.glob(".math500*.answers.jsonl")
    before = {line["problem"]: line["response"] for line in map(json.loads, journal.read_text().splitlines())}
    finished_at = (tmp_path / "mathvision_testmini.json").stat().st_mtime_ns
    output = run("tools/evaluate.py", *arguments)
    unchanged = (tmp_path / "mathvision_testmini.json").stat().st_mtime_ns == finished_at
    assert unchanged, "what is done stays as it is"
    for name, count in SETS.items():
        result = json.loads((tmp_path / f"{name}.json").read_text())
        responses = [json.loads(line) for line in (tmp_path / f"{name}.responses.jsonl").read_text().splitlines()]
        greedy = [response["index"] for response in responses if response["sample"] is None]
        assert greedy == list(range(count)) and result["problems"] == count, "none lost, none twice"
        assert result["dropped"] <= count * 0.05 and f"{name}: " in output
        assert 0 <= result["greedy"]["low"] <= result["greedy"]["accuracy"] <= result["greedy"]["high"] <= 1
    assert len(responses) == LIMIT and len(before) == STORED
    assert all(responses[at]["response"] == response["response"] for at, response in before.items())
    aime = json.loads((tmp_path / "aime2024.json").read_text())
    assert aime["sampled"]["samples"] == 16 and "<|im_start|>" in aime["prompt"]
