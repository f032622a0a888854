"""Write ``summary.json``: the few numbers by which an experiment is judged."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

from ovr_megatron.analysis.experiment import MODELS, Experiment
from ovr_megatron.evaluation.statistics import mean_of_first, mean_of_last
from ovr_megatron.runtime.files import write_json

ENDS = 10  # iterations at either end of the reward curve

ModelAccuracies = dict[str, float | int | None]
"""Greedy accuracy by model, and under ``problems`` the least number of problems that any was evaluated on."""


class RewardEnds(TypedDict):
    """Mean reward of the first and of the last iterations."""

    first10: float | None
    last10: float | None


class LossEnds(TypedDict):
    """Mean training loss of the first and of the last steps of supervised fine-tuning; the last validation loss."""

    first10: float | None
    last10: float | None
    validation: float | None
    lowest_validation: float | None


class LargestMismatch(TypedDict):
    """Largest difference between rollout and trainer log-probabilities in any iteration."""

    max: float | None


class ExperimentSummary(TypedDict):
    """Content of ``summary.json``, see `summarise`."""

    accuracy: ModelAccuracies
    accuracy_text: ModelAccuracies
    accuracy_caption: ModelAccuracies
    loss: LossEnds
    reward: RewardEnds
    mismatch: LargestMismatch
    wall_seconds: float | None
    peak_memory_bytes: int | None
    exported_model: str | None


def summarise(experiment: Experiment) -> ExperimentSummary:
    """Return the numbers; None stands for those that the folder does not hold yet.

    Returns:
        ``accuracy`` (visual puzzles), ``accuracy_text`` and ``accuracy_caption``: greedy fractions of ``base``,
        ``cold_start``, ``rl`` and ``average``, and the number of ``problems``.  ``loss`` of supervised fine-tuning:
        means of the ``first10`` and ``last10`` steps, and the last and the lowest ``validation`` loss.  ``reward``:
        means of the ``first10`` and ``last10`` iterations.  ``mismatch.max``: the largest difference between rollout
        and trainer log-probabilities in any iteration.  ``wall_seconds`` (sum) and ``peak_memory_bytes`` (largest) of
        the commands under ``measured``.  ``exported_model``: path of the final Hugging Face folder.
    """
    sft = experiment.stages.get("cold_start")
    losses = sft.values("loss/train") if sft else []
    validation = sft.values("validation/loss") if sft else []
    rl = experiment.stages.get("rl")
    rewards = rl.values("reward/mean") if rl else []
    mismatches = rl.values("rollout/mismatch_max") if rl else []
    wall_times = [command["wall_seconds"] for command in experiment.measured.values()]
    peaks = [command["peak_memory_bytes"] for command in experiment.measured.values()]
    exported = experiment.exported
    return {
        "accuracy": _accuracies(experiment, "visual"),
        "accuracy_text": _accuracies(experiment, "text"),
        "accuracy_caption": _accuracies(experiment, "caption"),
        "loss": {
            "first10": mean_of_first(losses, ENDS),
            "last10": mean_of_last(losses, ENDS),
            "validation": validation[-1] if validation else None,
            "lowest_validation": min(validation, default=None),
        },
        "reward": {
            "first10": mean_of_first(rewards, ENDS),
            "last10": mean_of_last(rewards, ENDS),
        },
        "mismatch": {"max": max(mismatches, default=None)},
        "wall_seconds": sum(wall_times) if wall_times else None,  # the sum of none is 0, which reads like a measurement
        "peak_memory_bytes": max(peaks, default=None),
        "exported_model": str(exported) if exported else None,
    }


def write_summary(experiment: Experiment) -> Path:
    """Write ``summary.json`` into the experiment's folder and return its path."""
    return write_json(experiment.dir / "summary.json", summarise(experiment))


def _accuracies(experiment: Experiment, problem_set: str) -> ModelAccuracies:
    accuracies: ModelAccuracies = {}
    problem_counts: list[int] = []
    for model in MODELS:
        score = experiment.score(model, problem_set)
        accuracies[model] = score["accuracy"] if score else None
        if score:
            problem_counts.append(score["problems"])
    # Every model was asked at least so many.
    accuracies["problems"] = min(problem_counts, default=None)
    return accuracies
