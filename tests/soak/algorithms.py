"""Three seeds of the miniature in several variants of RL: reward by iteration as a figure and a table.

    python tests/soak/algorithms.py --run runs/algorithms --out docs/images [--iterations 60] [--seeds 1 2 3]
    python tests/soak/algorithms.py --run runs/algorithms --out docs/images --compare rounds
    python tests/soak/algorithms.py --run runs/algorithms --out docs/images --compare critic --iterations 20
    python tests/soak/algorithms.py --run runs/algorithms --out docs/images --compare critic_1024 --iterations 20

`methods`, the default, compares PPO, GRPO and RLOO, with the settings of their rows in docs/algorithms.md.  `rounds`
compares rounds of PPO that wait for every response with tail batching and with partial rollouts at staleness 1.
`critic` compares PPO whose critic starts from the policy's weights with PPO whose values were pretrained on rollouts
of the cold start, each with the paper's advantages and with those of `algorithm.lam_policy=0.95`.  `critic_1024` does
so with the latter, and with 1,024 responses an iteration instead of 256, so that a run varies less.

Every seed has its own base model and cold start, from which all variants set out with as many responses an
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

WITH_CRITIC = ("prompts=128", "responses=2")
WITHOUT_CRITIC = ("prompts=32", "responses=8", "algorithm.critic_warmup_iterations=0")
METHODS = {"PPO": WITH_CRITIC, "GRPO": WITHOUT_CRITIC, "RLOO": WITHOUT_CRITIC}
TAIL_BATCHING = (*WITH_CRITIC, "rollout.schedule=static", "rollout.oversample=0.5")
ROUNDS = {
    "PPO": WITH_CRITIC,
    "tail batching": TAIL_BATCHING,
    "staleness 1": (*TAIL_BATCHING, "rollout.max_staleness=1", "algorithm.correction=token_truncate"),
}
CRITIC = {
    "fresh critic": ("algorithm.critic_warmup_iterations=0",),
    "pretrained critic": ("algorithm.critic_warmup_iterations=0", "critic.path={values}"),
}
# Advantages that trust the values, as in VC-PPO (arXiv 2503.01491).
TRUSTED_VALUES = {f"{name}, lam_policy 0.95": (*rest, "algorithm.lam_policy=0.95") for name, rest in CRITIC.items()}
# Of the rollouts of one policy, on which the values are pretrained: sizes, iterations, steps of the critic in each.
STORED = {"critic": (WITH_CRITIC, 96, 16), "critic_1024": (("prompts=512", "responses=2"), 96, 32)}
COLOURS = ("#d9652b", "#3a7cbd", "#1d7a46", "#7d55a8")
WINDOW = 5  # iterations of the moving average


def launch(module: str, recipe: str, run: Path, last: int, *settings: str) -> None:
    """Train a stage on two processes unless its last checkpoint is there."""
    if (run / f"checkpoints/step_{last:06d}/manifest.json").exists():
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", f"ovr_megatron.{module}", "--config-name", recipe, f"run.dir={run}", *settings]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}, check=True)


def pretrain_values(comparison: str, folder: Path, start: str, seed: int) -> Path:
    """Train the critic alone on stored rollouts of the cold start; return its last checkpoint."""
    sizes, iterations, steps = STORED[comparison]
    # Another seed than that of PPO: the critic must not have seen the prompts with which PPO begins.
    common = (start, f"run.seed={seed + 100}", f"iterations={iterations}", "run.keep_last=1", *sizes)
    stored, values = folder / "stored_rollouts", folder / "values"
    if not (stored / f"rollouts/{iterations - 1:06d}.jsonl").exists():
        launch("rl", "tiny_rl", stored, iterations, *common, "only=rollout")
    # Half the rate of the recipe: a step has 16 or 32 responses, and at a higher rate their noise stays in the values.
    learn = ("only=critic", f"rollouts_from={stored}", f"algorithm.critic_steps={steps}", "critic.optimizer.lr=1.5e-4")
    launch("rl", "tiny_rl", values, iterations, *common, *learn)
    return values / f"checkpoints/step_{iterations:06d}"


def read_metric(run: Path, key: str) -> list[float]:
    """Return a metric of every iteration."""
    lines = map(json.loads, (run / "metrics/train.jsonl").read_text().splitlines())
    return [line[key] for line in lines]


def table_row(comparison: str, run: Path) -> dict[str, str]:
    """Return the numbers of a run by the titles of their columns."""
    rewards = read_metric(run, "reward/mean")
    if comparison in STORED:
        explained = read_metric(run, "critic/explained_variance")
        return {
            "explained variance, iteration 1": f"{explained[0]:.3f}",
            "mean of iterations 1 to 5": f"{np.mean(explained[:5]):.3f}",
            f"reward, mean of {len(rewards)} iterations": f"{np.mean(rewards):.3f}",
        }
    return {
        "first 10 iterations": f"{np.mean(rewards[:10]):.3f}",
        "last 10 iterations": f"{np.mean(rewards[-10:]):.3f}",
    }


def variants(comparison: str) -> dict[str, tuple[str, ...]]:
    """Return the settings of each variant of a comparison, by its name."""
    if comparison == "rounds":
        return ROUNDS
    if comparison in STORED:
        sizes = STORED[comparison][0]
        chosen = CRITIC | TRUSTED_VALUES if comparison == "critic" else TRUSTED_VALUES
        return {name: (*sizes, *rest) for name, rest in chosen.items()}
    methods = documented_methods()
    return {name: (*sizes, *(f"algorithm.{setting}" for setting in methods[name])) for name, sizes in METHODS.items()}


def main() -> None:
    """Train what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", choices=["methods", "rounds", *STORED], default="methods")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    settings = variants(args.compare)
    runs: dict[str, list[Path]] = {name: [] for name in settings}
    for seed in args.seeds:
        folder = (args.run / f"seed{seed}").resolve()
        if not (folder / "init/config.json").exists():
            make = [sys.executable, ROOT / "tools/make_tiny_model.py", "--out", folder / "init", "--seed", str(seed)]
            subprocess.run(make, check=True)
        launch("coldstart", "tiny_base", folder / "base", 1000, f"model.path={folder / 'init'}", f"run.seed={seed}")
        base = f"model.path={folder / 'base/checkpoints/step_001000'}"
        launch("coldstart", "tiny_cold_start", folder / "cold_start", 130, base, f"run.seed={seed}")
        start = f"model.path={folder / 'cold_start/checkpoints/step_000130'}"
        # Its variants have names of `critic`, whose runs are others.
        if args.compare == "critic_1024":
            folder /= "rounds_of_1024"
        values = pretrain_values(args.compare, folder, start, seed) if args.compare in STORED else None
        for name, variant in settings.items():
            variant = [setting.replace("{values}", str(values)) for setting in variant]
            run = folder / name.lower().replace(" ", "_").replace(",", "")
            common = (start, f"run.seed={seed}", f"iterations={args.iterations}", "run.keep_last=1")
            launch("rl", "tiny_rl", run, args.iterations, *common, *variant)
            runs[name].append(run)
    args.out.mkdir(parents=True, exist_ok=True)
    file_name = "algorithms" if args.compare == "methods" else args.compare
    curves = {name: [read_metric(run, "reward/mean") for run in folders] for name, folders in runs.items()}
    draw(curves, args.out / f"{file_name}.png")
    path = args.out / f"{file_name}.csv"
    rows = [
        {"variant": name, "seed": seed, **table_row(args.compare, run)}
        for name, folders in runs.items()
        for seed, run in zip(args.seeds, folders, strict=True)
    ]
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    print(path.read_text())


def draw(curves: dict[str, list[list[float]]], path: Path) -> None:
    """Mean over the seeds, and the range between them."""
    figure, axes = plt.subplots(figsize=(7.2, 3.8), dpi=150)
    for (name, seeds), colour in zip(curves.items(), COLOURS, strict=False):
        smooth = np.array([moving_average(values, WINDOW) for values in seeds])
        places = np.arange(1, smooth.shape[1] + 1)
        axes.fill_between(places, smooth.min(0), smooth.max(0), color=colour, alpha=0.15, linewidth=0)
        axes.plot(places, smooth.mean(0), color=colour, label=name, linewidth=2)
    axes.set(xlabel="iteration", ylabel=f"mean reward (moving average of {WINDOW})", ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
