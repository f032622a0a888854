"""Every twentieth case of each area of tests/soak/bad_inputs.py: a sentence and exit code 2, nothing else."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
AREAS = (
    "sft",
    "rl",
    "preparation",
    "rows",
    "sources",
    "tokenised sets",
    "models",
    "checkpoints",
    "rewards",
    "tools",
)


@pytest.fixture(scope="module")
def answers(loaded_python: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("bad_inputs") / "answers.jsonl"
    command = [loaded_python, ROOT / "tests/soak/bad_inputs.py", "--every", "20", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr[-4000:]
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_every_area_has_cases(answers: list[dict[str, Any]]) -> None:
    assert {answer["area"] for answer in answers} == set(AREAS)
    assert len(answers) >= 40


@pytest.mark.parametrize("area", AREAS)
def test_each_is_refused_in_a_sentence(answers: list[dict[str, Any]], area: str) -> None:
    wrong = [answer for answer in answers if answer["area"] == area and answer["outcome"] != "refused"]
    assert not wrong
