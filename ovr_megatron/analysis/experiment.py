"""Read an experiment's folder: what each stage logged and how each model scored.

An experiment holds the run folders ``base``, ``cold_start`` and ``rl``, evaluations under
``eval/MODEL/SET.json`` and measured commands under ``measured/NAME.json``; a single run folder is an
experiment of one stage.  Everything may be missing: a run that is still going can be read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ovr_megatron.errors import UserError
from ovr_megatron.runtime.step_lines import read_metrics

# Names as in the folder, and titles as people read them; all in the order of the recipe.
STAGES = {"base": "Base model", "cold_start": "Cold start", "rl": "RL"}
MODELS = {"base": "Base", "cold_start": "Cold start", "rl": "RL", "average": "Average"}
SETS = {"visual": "Visual puzzles", "text": "Text puzzles", "caption": "Captions"}


class ExperimentError(UserError, ValueError):
    """A folder that is no experiment; the message names it and says what is expected."""


@dataclass(frozen=True)
class Stage:
    """One run folder: its resolved configuration and its metrics, one dictionary a step."""

    name: str
    dir: Path
    config: dict[str, Any]
    metrics: list[dict[str, float]]

    @property
    def title(self) -> str:
        """The stage's name for people."""
        return STAGES.get(self.name, self.name)

    @property
    def done(self) -> int:
        """Number of steps or iterations that are logged."""
        return int(self.metrics[-1]["step"]) + 1 if self.metrics else 0  # steps count from 0

    @property
    def total(self) -> int:
        """Number of steps or iterations that the configuration asks for; 0 if it does not say."""
        return int(self.config.get("iterations") or self.config.get("steps") or 0)

    @property
    def unit(self) -> str:
        """Unit of `done` and `total`: iterations of PPO, steps otherwise."""
        return "iterations" if "iterations" in self.config else "steps"

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return the steps at which a metric was logged, and its values."""
        lines = [line for line in self.metrics if line.get(key) is not None]
        return [int(line["step"]) for line in lines], [line[key] for line in lines]

    def values(self, key: str) -> list[float]:
        """Return the values of a metric, in the order of the steps."""
        return self.series(key)[1]


@dataclass(frozen=True)
class Experiment:
    """The content of an experiment's folder so far.

    ``scores[model][set]`` is an evaluation, ``measured[name]`` a timed command, ``behaviours`` the result that
    ``ovr behaviours`` wrote to ``behaviours/``, empty if there is none.
    """

    dir: Path
    stages: dict[str, Stage]
    scores: dict[str, dict[str, dict[str, Any]]]
    measured: dict[str, dict[str, float]]
    behaviours: dict[str, Any]

    def evaluation(self, model: str, problem_set: str) -> dict[str, Any] | None:
        """Return the evaluation of ``model`` on ``problem_set``, None if there is none."""
        return self.scores.get(model, {}).get(problem_set)

    def score(self, model: str, problem_set: str) -> dict[str, Any] | None:
        """Return the greedy result of ``model`` on ``problem_set``, None if it was not evaluated."""
        evaluation = self.evaluation(model, problem_set)
        return evaluation["greedy"] if evaluation else None

    @property
    def sets(self) -> dict[str, str]:
        """Name and title of every problem set that some model was evaluated on, the miniature's own first."""
        names: set[str] = set().union(*self.scores.values())
        miniature_sets = [name for name in SETS if name in names]
        other_sets = sorted(names - set(SETS))
        return {name: SETS.get(name, name) for name in miniature_sets + other_sets}

    @property
    def exported(self) -> Path | None:
        """Folder of the final model: the exported average, else the exported RL model, else None."""
        for name in ("average", "rl"):
            folder = self.dir / "export" / name
            if (folder / "config.json").is_file():
                return folder.resolve()
        return None

    @property
    def shows_behaviours(self) -> bool:
        """Whether any judged trace has any behaviour: without one there is nothing to draw."""
        for checkpoint in self.behaviours.get("checkpoints", {}).values():
            shares = [counts["emergence"] for counts in checkpoint["behaviours"].values()]
            if any(share and share["rate"] for share in shares):
                return True
        return False

    @property
    def missing(self) -> list[str]:
        """One sentence for each part of the recipe that is not there yet."""
        sentences = []
        for name, title in STAGES.items():
            stage = self.stages.get(name)
            if stage is None or not stage.metrics:
                sentences.append(f"{title}: no metrics yet.")
            elif stage.done < stage.total:
                sentences.append(f"{title}: {stage.done} of {stage.total} {stage.unit} done.")
        unscored = [title for name, title in MODELS.items() if not self.scores.get(name)]
        if unscored:
            sentences.append(f"Evaluation: nothing yet of {', '.join(unscored)}.")
        if self.exported is None:
            sentences.append("Export: no final model yet.")
        return sentences


def read_experiment(folder: Path) -> Experiment:
    """Read what ``folder`` holds so far.

    Raises:
        ExperimentError: there is no such folder, or nothing in it comes from a run.
    """
    if not folder.is_dir():
        raise ExperimentError(f"{folder}: there is no such folder; give the run folder of an experiment")
    if (folder / "config.yaml").is_file():
        stage = _read_stage(folder, "")
        stages = {stage.name: stage}
    else:
        stages = {name: _read_stage(path, name) for name, path in stage_folders(folder).items()}
    scores = {model.name: _read_json_files(model) for model in sorted((folder / "eval").glob("*/"))}
    if not stages and not scores:
        raise ExperimentError(
            f"{folder}: neither a run folder (config.yaml) nor an experiment ({', '.join(STAGES)}, eval) is in it"
        )
    measured = _read_json_files(folder / "measured")
    behaviours_file = folder / "behaviours/behaviours.json"
    behaviours = _read_json(behaviours_file) if behaviours_file.is_file() else {}
    return Experiment(folder, stages, scores, measured, behaviours)


def stage_folders(folder: Path) -> dict[str, Path]:
    """Return the run folder of each stage below ``folder``.

    A folder named like the stage is taken (``cold_start``), else the one that was changed last of those whose
    ``config.yaml`` is of the stage, whatever their names.  ``base`` goes by its name alone, because its settings are
    those of a cold start.
    """
    folders = {name: folder / name for name in STAGES if (folder / name).is_dir()}
    settings = [path for path in sorted(folder.glob("*/config.yaml")) if path.parent.name not in STAGES]
    # From the oldest to the newest: the last one assigned is the one that was changed last.
    for path in sorted(settings, key=lambda path: path.stat().st_mtime):
        name = _stage_name(yaml.safe_load(path.read_text()) or {})
        if name and not (folder / name).is_dir():
            folders[name] = path.parent
    return {name: folders[name] for name in STAGES if name in folders}


def _stage_name(config: dict[str, Any]) -> str | None:
    """Return the stage that has such settings, None if no stage has."""
    if "iterations" in config:
        return "rl"
    return "cold_start" if "packs_per_step" in config else None


def _read_stage(folder: Path, name: str) -> Stage:
    """Read a run folder; an empty ``name`` means that its settings name the stage."""
    settings = folder / "config.yaml"
    metrics = folder / "metrics" / "train.jsonl"
    config = yaml.safe_load(settings.read_text()) if settings.is_file() else {}
    name = name or ("rl" if "iterations" in config else "cold_start")
    return Stage(name, folder, config, read_metrics(metrics) if metrics.is_file() else [])


def _read_json_files(folder: Path) -> dict[str, dict[str, Any]]:
    return {file.stem: _read_json(file) for file in sorted(folder.glob("*.json"))}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ExperimentError(f"{path}: is not JSON ({error}); remove the file and make it anew") from error
