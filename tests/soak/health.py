"""A healthy run of the miniature and four unhealthy ones: a figure with a panel for each signal, and a table.

    python tests/soak/health.py --start CHECKPOINT --run runs/health --out docs/images

All set out from CHECKPOINT, the last one of the cold start that examples/miniature.sh trains, one after the other in a
process.  What is there already is not done again, so the command can be stopped and given again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from ovr_megatron import RL, compose

RULES = Path(__file__).resolve().parent  # of health_rules.py
ITERATIONS = 30
EDGE = 5  # first and last iterations that the table averages

_PUZZLE = "answered=0&split=heldout&count=1000"
COMMON = (
    *(f"iterations={ITERATIONS}", "prompts=64", "responses=4", "curriculum=[{until: 1000, max_tokens: 128}]"),
    "algorithm.policy_steps=2",
    # So small that it measures the divergence from the reference and changes nothing else.
    *("algorithm.kl_coefficient=1e-6", "run.save_every=10", "run.keep_last=1"),
    *("evaluation.every=5", "evaluation.limit=100", "evaluation.max_tokens=96"),
    "evaluation.sources=["
    f"{{path: 'puzzle:digits?form=image&task=sum&{_PUZZLE}', name: visual}}, "
    f"{{path: 'puzzle:digits?form=text&task=sum&{_PUZZLE}', name: text}}]",
)
VARIANTS = {
    "healthy": (),
    "rule that pays for '+'": ("reward.rules={image: 'health_rules:shown_work', text: 'health_rules:shown_work'}",),
    "rate 30 times as high": ("optimizer.lr=6e-3",),
    "rule that pays for length": ("reward.rules={image: 'health_rules:length', text: 'health_rules:length'}",),
    "critic that does not learn": ("critic.optimizer.lr=1e-9",),
}
COLOURS = ("#1d7a46", "#d9652b", "#c2352b", "#3a7cbd", "#7d55a8")
# Title of a panel, and the keys that it shows: the first as a line, the second dashed.
PANELS = (
    ("mean reward in training", ("reward/mean",)),
    ("held-out accuracy: pictures, dashed texts", ("evaluation/visual", "evaluation/text")),
    ("share of prompts with unequal rewards", ("response/mixed_prompts",)),
    ("entropy of a token, nats", ("policy/entropy",)),
    ("clipped tokens: upper bound, dashed lower", ("policy/clip_fraction_high", "policy/clip_fraction_low")),
    ("KL to the reference", ("policy/reference_kl",)),
    ("explained variance of the critic", ("critic/explained_variance",)),
    ("advantages: p90, dashed p10", ("advantage/p90", "advantage/p10")),
    ("gradient norm of the policy", ("policy/grad_norm",)),
    ("response tokens: median, dashed p99", ("response/length_p50", "response/length_p99")),
    ("responses that ended by themselves", ("response/stopped",)),
    ("repeated 4-grams of a response", ("response/repetition",)),
)
LOGARITHMIC = ("KL to the reference",)


def train(name: str, start: Path, folder: Path) -> bool:
    """Train a variant in ``folder`` unless its last checkpoint is there; return whether it is done."""
    if (folder / f"checkpoints/step_{ITERATIONS:06d}/manifest.json").exists():
        return True
    config = compose("tiny_rl", [f"run.dir={folder}", f"model.path={start}", *COMMON, *VARIANTS[name]])
    with RL(config) as rl:
        rl.run()
        return not rl.stopped


def read_metrics(run: Path) -> dict[str, dict[int, float]]:
    """Return the values of each key by iteration, counted from 1."""
    series: dict[str, dict[int, float]] = {}
    path = run / "metrics/train.jsonl"
    for line in path.read_text().splitlines():
        metrics = json.loads(line)
        for key, value in metrics.items():
            series.setdefault(key, {})[metrics["step"] + 1] = value
    return series


def draw(runs: dict[str, dict[str, dict[int, float]]], path: Path) -> None:
    """Draw a panel for each signal, with a line for each run."""
    figure, grid = plt.subplots(4, 3, figsize=(10.5, 10.5), sharex=True)
    for axes, (title, keys) in zip(grid.flat, PANELS, strict=True):
        for (name, series), colour in zip(runs.items(), COLOURS, strict=True):
            for key, style in zip(keys, ("-", "--"), strict=False):
                values = series.get(key, {})
                label = name if style == "-" else None
                axes.plot(list(values), list(values.values()), style, color=colour, label=label, linewidth=1.4)
        if title in LOGARITHMIC:
            axes.set_yscale("log")
        axes.set_title(title, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("iteration", fontsize=8)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path, dpi=100)


def write_table(runs: dict[str, dict[str, dict[int, float]]], path: Path) -> None:
    """Write the mean of each shown key over the first and the last iterations of each run."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["signal", "run", f"first {EDGE} iterations", f"last {EDGE} iterations"])
        for _, keys in PANELS:
            for key in keys:
                for name, series in runs.items():
                    values = list(series.get(key, {}).values())
                    if key.startswith("evaluation/"):
                        first, last = values[:1], values[-1:]
                    else:
                        first, last = values[:EDGE], values[-EDGE:]
                    table.writerow([key, name, f"{np.mean(first):.4g}", f"{np.mean(last):.4g}"])


def main() -> int:
    """Train what is missing, then draw; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, required=True, help="checkpoint of the cold start")
    parser.add_argument("--run", type=Path, required=True, help="folder of the five runs")
    parser.add_argument("--out", type=Path, required=True, help="folder of health.png and health.csv")
    args = parser.parse_args()
    # Graders are processes of their own, which import the rules.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(RULES), os.environ.get("PYTHONPATH", "")])
    folders = {name: args.run.resolve() / str(i) for i, name in enumerate(VARIANTS)}
    for name, folder in folders.items():
        if not train(name, args.start.resolve(), folder):
            return 75
    runs = {name: read_metrics(folder) for name, folder in folders.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    draw(runs, args.out / "health.png")
    write_table(runs, args.out / "health.csv")
    print((args.out / "health.csv").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
