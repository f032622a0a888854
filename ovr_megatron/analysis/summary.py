"""Write ``summary.json``: the few numbers by which an experiment is judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ovr_megatron.analysis.experiment import MODELS, Experiment
from ovr_megatron.evaluation.statistics import mean_of_first, mean_of_last
from ovr_megatron.runtime.files import write_json

ENDS = 10  # iterations at either end of the reward curve


def summarise(experiment: Experiment) -> dict[str, Any]:
    """Return the numbers; None stands for those that the folder does not hold yet.

    Returns:
        ``accuracy`` (visual puzzles), ``accuracy_text`` and ``accuracy_caption``: greedy fractions of ``base``,
        ``cold_start``, ``rl`` and ``average``, and the number of ``problems``.  ``reward``: means of the
        ``first10`` and ``last10`` iterations.  ``mismatch.max``: the largest difference between rollout and trainer
        log-probabilities in any iteration.  ``wall_seconds`` (sum) and ``peak_memory_bytes`` (largest) of the
        commands under ``measured``.  ``exported_model``: path of the final Hugging Face folder.
    """
    rl = experiment.stages.get("rl")
    rewards = rl.values("reward/mean") if rl else []
    mismatches = rl.values("rollout/mismatch_max") if rl else []
    measured = experiment.measured.values()
    return {
        "accuracy": _accuracy(experiment, "visual"),
        "accuracy_text": _accuracy(experiment, "text"),
        "accuracy_caption": _accuracy(experiment, "caption"),
        "reward": {"first10": mean_of_first(rewards, ENDS), "last10": mean_of_last(rewards, ENDS)},
        "mismatch": {"max": max(mismatches, default=None)},
        "wall_seconds": sum(command["wall_seconds"] for command in measured) if measured else None,
        "peak_memory_bytes": max((command["peak_memory_bytes"] for command in measured), default=None),
        "exported_model": str(experiment.exported) if experiment.exported else None,
    }


def write_summary(experiment: Experiment) -> Path:
    """Write ``summary.json`` into the experiment's folder and return its path."""
    return write_json(experiment.dir / "summary.json", summarise(experiment))


def _accuracy(experiment: Experiment, problem_set: str) -> dict[str, float | int | None]:
    """Return the accuracy of each model, and the least number of problems that any of them was evaluated on."""
    scores = {model: experiment.score(model, problem_set) for model in MODELS}
    problem_counts = [score["problems"] for score in scores.values() if score]
    problems = min(problem_counts, default=None)
    accuracy = {model: score["accuracy"] if score else None for model, score in scores.items()}
    return accuracy | {"problems": problems}
