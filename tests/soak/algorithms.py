"""PPO, GRPO and RLOO on the miniature, three seeds each: reward by iteration as a figure and a table.

The settings of each method are those of its row in docs/algorithms.md.

    python tests/soak/algorithms.py --run runs/algorithms --out docs/images [--iterations 60] [--seeds 1 2 3]

Every seed has its own base model and cold start, from which the three methods set out with as many responses an
iteration.  What is there already is not done again, so the command can be stopped and given again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from ovr_megatron.evaluation.statistics import moving_average

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/ppo"))

from methods import documented_methods  # noqa: E402

WITHOUT_CRITIC = ("prompts=32", "responses=8", "algorithm.critic_warmup_iterations=0")
METHODS = {"PPO": ("prompts=128", "responses=2"), "GRPO": WITHOUT_CRITIC, "RLOO": WITHOUT_CRITIC}
COLOURS = {"PPO": "#d9652b", "GRPO": "#3a7cbd", "RLOO": "#1d7a46"}
WINDOW = 5  # iterations of the moving average


def launch(module: str, recipe: str, run: Path, last: int, *settings: str) -> None:
    """Train a stage on two processes unless its last checkpoint is there."""
    if (run / f"checkpoints/step_{last:06d}/manifest.json").exists():
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", f"ovr_megatron.{module}", "--config-name", recipe, f"run.dir={run}", *settings]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}, check=True)


def rewards(run: Path) -> list[float]:
    """Mean reward of every iteration."""
    lines = map(json.loads, (run / "metrics/train.jsonl").read_text().splitlines())
    return [line["reward/mean"] for line in lines]


def main() -> None:
    """Train what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    curves: dict[str, list[list[float]]] = {name: [] for name in METHODS}
    for seed in args.seeds:
        folder = (args.run / f"seed{seed}").resolve()
        if not (folder / "init/config.json").exists():
            make = [sys.executable, ROOT / "tools/make_tiny_model.py", "--out", folder / "init", "--seed", str(seed)]
            subprocess.run(make, check=True)
        launch("coldstart", "tiny_base", folder / "base", 1000, f"model.path={folder / 'init'}", f"run.seed={seed}")
        base = f"model.path={folder / 'base/checkpoints/step_001000'}"
        launch("coldstart", "tiny_cold_start", folder / "cold_start", 130, base, f"run.seed={seed}")
        start = f"model.path={folder / 'cold_start/checkpoints/step_000130'}"
        for name, sizes in METHODS.items():
            run = folder / name.lower()
            settings = [f"algorithm.{setting}" for setting in documented_methods()[name]]
            more = (start, f"run.seed={seed}", f"iterations={args.iterations}", "run.keep_last=1", *sizes, *settings)
            launch("rl", "tiny_rl", run, args.iterations, *more)
            curves[name].append(rewards(run))
    args.out.mkdir(parents=True, exist_ok=True)
    draw(curves, args.out / "algorithms.png")
    with (args.out / "algorithms.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["method", "seed", "first 10 iterations", "last 10 iterations"])
        for name, found in curves.items():
            for seed, values in zip(args.seeds, found, strict=True):
                table.writerow([name, seed, f"{np.mean(values[:10]):.3f}", f"{np.mean(values[-10:]):.3f}"])
    print((args.out / "algorithms.csv").read_text())


def draw(curves: dict[str, list[list[float]]], path: Path) -> None:
    """Mean over the seeds, and the range between them."""
    figure, axes = plt.subplots(figsize=(7.2, 3.8), dpi=150)
    for name, found in curves.items():
        smooth = np.array([moving_average(values, WINDOW) for values in found])
        places = np.arange(1, smooth.shape[1] + 1)
        axes.fill_between(places, smooth.min(0), smooth.max(0), color=COLOURS[name], alpha=0.15, linewidth=0)
        axes.plot(places, smooth.mean(0), color=COLOURS[name], label=name, linewidth=2)
    axes.set(xlabel="iteration", ylabel=f"mean reward (moving average of {WINDOW})", ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
