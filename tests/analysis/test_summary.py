"""The keys are those by which an experiment is judged; the numbers are worked out again from the files."""

import json
import shutil

import pytest

from ovr_megatron.analysis.experiment import read_experiment
from ovr_megatron.analysis.summary import write_summary


def summary_of(folder):
    return json.loads(write_summary(read_experiment(folder)).read_text())


def test_summary_of_a_finished_experiment(experiment_dir):
    lines = (experiment_dir / "rl" / "metrics" / "train.jsonl").read_text().splitlines()
    rewards = [json.loads(line)["reward/mean"] for line in lines]
    sft_lines = (experiment_dir / "cold_start" / "metrics" / "train.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss/train"] for line in sft_lines]
    assert summary_of(experiment_dir) == {
        "accuracy": {"base": 0.0, "cold_start": 0.642, "rl": 0.882, "average": 0.892, "problems": 500},
        "accuracy_text": {"base": 0.006, "cold_start": 0.882, "rl": 0.938, "average": 0.942, "problems": 500},
        "accuracy_caption": {"base": 0.998, "cold_start": 0.82, "rl": 0.754, "average": 0.76, "problems": 500},
        "loss": {
            "first10": pytest.approx(sum(losses[:10]) / 10),
            "last10": pytest.approx(sum(losses[-10:]) / 10),
            "validation": None,
            "lowest_validation": None,
        },
        "reward": {
            "first10": pytest.approx(sum(rewards[:10]) / 10),
            "last10": pytest.approx(sum(rewards[-10:]) / 10),
        },
        "mismatch": {"max": 2e-5},
        "wall_seconds": 840.5,
        "peak_memory_bytes": 5_100_000_000,
        "exported_model": str((experiment_dir / "export" / "average").resolve()),
    }


def test_what_is_missing_is_null(experiment_dir):
    for part in ("rl", "eval/average", "eval/rl", "export", "measured"):
        shutil.rmtree(experiment_dir / part)
    found = summary_of(experiment_dir)
    assert found["accuracy"] == {"base": 0.0, "cold_start": 0.642, "rl": None, "average": None, "problems": 500}
    assert found["reward"] == {"first10": None, "last10": None}
    assert found["mismatch"] == {"max": None}
    assert found["wall_seconds"] is found["peak_memory_bytes"] is found["exported_model"] is None


def test_problems_is_what_every_model_was_asked(experiment_dir):
    path = experiment_dir / "eval" / "rl" / "visual.json"
    score = json.loads(path.read_text())
    score["greedy"]["problems"] = 40
    path.write_text(json.dumps(score))
    assert summary_of(experiment_dir)["accuracy"]["problems"] == 40
