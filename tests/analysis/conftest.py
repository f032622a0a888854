"""A small experiment's folder with made-up numbers, in the layout that the quickstart writes."""

import json
import math
import random
from pathlib import Path

import PIL.Image
import pytest

ACCURACY = {
    "base": {"visual": 0, "text": 3, "caption": 499},
    "cold_start": {"visual": 321, "text": 441, "caption": 410},
    "rl": {"visual": 441, "text": 469, "caption": 377},
    "average": {"visual": 446, "text": 471, "caption": 380},
}
PROBLEMS = 500
ITERATIONS = 60


@pytest.fixture
def experiment_dir(tmp_path: Path) -> Path:
    """A finished experiment, to be changed by the test."""
    return _make_experiment(tmp_path)


@pytest.fixture(scope="session")
def finished_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished experiment, to be left as it is."""
    return _make_experiment(tmp_path_factory.mktemp("finished"))


def _make_experiment(folder: Path) -> Path:
    """Three stages, four evaluated models, an export, measured commands."""
    rng = random.Random(0)
    for name, steps in (("base", 300), ("cold_start", 80)):
        stage = folder / name
        _write(stage / "config.yaml", f"run:\n  seed: 1\nsteps: {steps}\n")
        _lines(stage / "metrics" / "train.jsonl", [_supervised(step, rng) for step in range(steps)])
    _write(folder / "rl" / "config.yaml", f"run:\n  seed: 1\niterations: {ITERATIONS}\n")
    _lines(folder / "rl" / "metrics" / "train.jsonl", [_iteration(i, rng) for i in range(ITERATIONS)])
    for iteration in range(ITERATIONS):
        _rollouts(folder / "rl", iteration, rng)
    for model, sets in ACCURACY.items():
        for name, correct in sets.items():
            _write(folder / "eval" / model / f"{name}.json", json.dumps(_score(model, name, correct)))
        _write(folder / "export" / model / "config.json", "{}")
    for name, seconds, peak in (("base", 240.5, 2_000_000_000), ("rl", 600.0, 5_100_000_000)):
        _write(folder / "measured" / f"{name}.json", json.dumps({"wall_seconds": seconds, "peak_memory_bytes": peak}))
    return folder


def _supervised(step: int, rng: random.Random) -> dict:
    return {
        "step": step,
        "loss/train": 0.3 + 5 * math.exp(-step / 20) + 0.03 * rng.random(),
        "optimizer/lr": 1e-3,
        "optimizer/grad_norm": 1.0,
        "data/tokens": 4000,
        "perf/tokens_per_second": 5000 + 100 * rng.random(),
    }


def _iteration(i: int, rng: random.Random) -> dict:
    grown = 1 - math.exp(-i / 20)
    return {
        "step": i,
        "reward/mean": 0.45 + 0.4 * grown + 0.05 * rng.random(),
        "reward/source/visual": 0.4 + 0.4 * grown,
        "reward/source/text": 0.6 + 0.3 * grown,
        "response/length/source/visual": 22 + 2 * grown,
        "response/length/source/text": 30 + 9 * grown,
        "response/length": 28 + 6 * grown + (4 if i >= 30 else 0) + rng.random(),
        "response/stopped": 0.9 + 0.1 * grown,
        "curriculum/max_tokens": 96 if i < 30 else 128,
        "policy/loss": 0.0,
        "policy/entropy": 0.5 - 0.3 * grown,
        "policy/clip_fraction": 0.0,
        "policy/grad_norm": 1.0,
        "critic/loss": 0.1,
        "critic/grad_norm": 1.0,
        "critic/explained_variance": 0.5 * grown,
        "critic/value_mean": 0.012 + grown,
        "critic/value_std": 0.09,
        "critic/return_mean": 0.45,
        "rollout/mismatch_max": 2e-5 if i == 41 else 4e-6 + 1e-6 * rng.random(),
        "rollout/mismatch_mean": 1e-7,
        "timing/generate": 3.0,
        "timing/value": 0.5,
        "timing/update": 4.0,
        "timing/sync": 0.25,
        "timing/iteration": 8.0,
        "perf/generate_tokens_per_second": 3000.0,
        "perf/train_tokens_per_second": 2500.0,
    }


def _rollouts(stage: Path, iteration: int, rng: random.Random) -> None:
    lines = []
    for prompt in range(4):
        image = None
        if prompt < 2:
            image = f"rollouts/images/{iteration:06d}_{prompt}.png"
            (stage / image).parent.mkdir(parents=True, exist_ok=True)
            colours = [(240, 45, 35), (40, 225, 55), (40, 55, 240), (118, 118, 118)]
            picture = PIL.Image.new("RGB", (56, 56))
            for cell, colour in enumerate(rng.sample(colours, 4)):
                picture.paste(colour, (cell % 2 * 28, cell // 2 * 28, cell % 2 * 28 + 28, cell // 2 * 28 + 28))
            picture.save(stage / image)
        for response in range(2):
            lines.append(
                {
                    "iteration": iteration,
                    "prompt": "Add the red digits." if image else "red3 green2 green5 red5\nAdd the red digits.",
                    "response": "List: red3 green2 green5 red5. Take red:3,5. Add 3+5=8. So</think>\\boxed{8}",
                    "reward": float(response),
                    "answer": "8",
                    "source": "visual" if image else "text",
                    "tokens": 31,
                    "stopped": True,
                    "advantage_mean": 0.7,
                    "image": image,
                }
            )
    _lines(stage / "rollouts" / f"{iteration:06d}.jsonl", lines)


def _score(model: str, name: str, correct: int) -> dict:
    share = correct / PROBLEMS
    greedy = {
        "accuracy": share,
        "low": max(0.0, share - 0.03),
        "high": min(1.0, share + 0.03),
        "correct": correct,
        "problems": PROBLEMS,
        "tokens": 30.5,
        "stopped": 1.0,
    }
    return {
        "set": name,
        "model": model,
        "source": f"puzzle:{name}",
        "problems": PROBLEMS,
        "dropped": 0,
        "greedy": greedy,
        "sampled": None,
        "sources": {name: {"greedy": greedy, "sampled": None}},
        "settings": {"max_tokens": 96},
    }


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _lines(path: Path, rows: list[dict]) -> None:
    _write(path, "".join(json.dumps(row) + "\n" for row in rows))
