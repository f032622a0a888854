"""Read an experiment's folder: what each stage logged and how each model scored.

An experiment holds the run folders ``base``, ``cold_start`` and ``rl``, evaluations under
``eval/MODEL/SET.json`` and measured commands under ``measured/NAME.json``; a single run folder is an
experiment of one stage.  Everything may be missing: a run that is still going can be read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import yaml

from ovr_megatron.errors import UserError
from ovr_megatron.evaluation.behaviours import CheckpointRates, Emergence, SplitAccuracy, TransferRate
from ovr_megatron.evaluation.scoring import EvaluationResult, GreedyScores
from ovr_megatron.runtime.folder_kinds import describe_folder
from ovr_megatron.runtime.step_lines import read_metrics

if TYPE_CHECKING:
    # The module loads the engines of local judges, which a report does without.
    from ovr_megatron.evaluation.judging import BehaviourResult, CheckpointBehaviours

# Names as in the folder, and titles as people read them; all in the order of the recipe.
STAGES = {"base": "Base model", "cold_start": "Cold start", "rl": "RL"}
MODELS = {"base": "Base", "cold_start": "Cold start", "rl": "RL", "average": "Average"}
SETS = {"visual": "Visual puzzles", "text": "Text puzzles", "caption": "Captions"}

RUN_SETTINGS = "config.yaml"  # of every run folder


class ExperimentError(UserError, ValueError):
    """A folder that is no experiment; the message names it and says what is expected."""


class LengthLimit(TypedDict):
    """An entry of ``curriculum``: ``max_tokens`` until an iteration."""

    until: int
    max_tokens: int


class StageSettings(TypedDict, total=False):
    """The settings of ``config.yaml`` that the reports read by name; a model card reads more by their dotted keys."""

    iterations: int
    steps: int
    packs_per_step: int
    curriculum: list[LengthLimit]


class MeasuredCommand(TypedDict):
    """Content of ``measured/NAME.json``."""

    wall_seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Stage:
    """One run folder: its resolved configuration and its metrics, one dictionary a step."""

    name: str
    dir: Path
    config: StageSettings
    metrics: list[dict[str, float]]

    @property
    def title(self) -> str:
        """The stage's name for people; of supervised training in a folder of another name, not that of the paper."""
        if self.name == "cold_start" and not self.dir.resolve().name.startswith("cold"):
            return "SFT"
        return STAGES.get(self.name, self.name)

    @property
    def done(self) -> int:
        """Number of steps or iterations that are logged."""
        if not self.metrics:
            return 0
        return int(self.metrics[-1]["step"]) + 1  # steps count from 0

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
        steps: list[int] = []
        values: list[float] = []
        for line in self.metrics:
            value = line.get(key)
            if value is not None:
                steps.append(int(line["step"]))
                values.append(value)
        return steps, values

    def values(self, key: str) -> list[float]:
        """Return the values of a metric, in the order of the steps."""
        _, values = self.series(key)
        return values


@dataclass(frozen=True)
class Experiment:
    """The content of an experiment's folder so far.

    ``scores[model][set]`` is an evaluation, ``measured[name]`` a timed command, ``behaviours`` the result that
    ``ovr behaviours`` wrote to ``behaviours/``, None if there is none.  ``iteration`` is the one of the RL whose
    timeline is shown, None for the last one.
    """

    dir: Path
    stages: dict[str, Stage]
    scores: dict[str, dict[str, EvaluationResult]]
    measured: dict[str, MeasuredCommand]
    behaviours: BehaviourResult | None
    iteration: int | None = None

    def evaluation(self, model: str, problem_set: str) -> EvaluationResult | None:
        """Return the evaluation of ``model`` on ``problem_set``, None if there is none."""
        return self.scores.get(model, {}).get(problem_set)

    def score(self, model: str, problem_set: str) -> GreedyScores | None:
        """Return the greedy result of ``model`` on ``problem_set``, None if it was not evaluated."""
        evaluation = self.evaluation(model, problem_set)
        return evaluation["greedy"] if evaluation else None

    @property
    def sets(self) -> dict[str, str]:
        """Name and title of every problem set that some model was evaluated on, the miniature's own first."""
        names: set[str] = set()
        for evaluations in self.scores.values():
            names.update(evaluations)
        titles = {name: title for name, title in SETS.items() if name in names}
        for name in sorted(names - set(SETS)):
            titles[name] = name
        return titles

    @property
    def exported(self) -> Path | None:
        """Folder of the final model: the exported average, else the exported RL model, else None."""
        for name in ("average", "rl"):
            folder = self.dir / "export" / name
            if (folder / "config.json").is_file():
                return folder.resolve()
        return None

    @property
    def checkpoints(self) -> dict[str, CheckpointBehaviours]:
        """Rates of behaviours by model, empty if no traces were judged."""
        return self.behaviours.get("checkpoints", {}) if self.behaviours else {}

    def emergence(self, model: str, behaviour: str) -> Emergence | None:
        """Return how many of a model's traces show ``behaviour``, None if it was not counted."""
        checkpoint = self.checkpoints.get(model)
        if not checkpoint:
            return None
        rates = checkpoint.get("behaviours", {}).get(behaviour)
        return rates.get("emergence") if rates else None

    def transfer_rate(self, model: str, linguistic: str) -> TransferRate | None:
        """Return the transfer rate of a linguistic behaviour in a model's traces, None if it was not counted."""
        checkpoint = self.checkpoints.get(model)
        return checkpoint.get("transfer", {}).get(linguistic) if checkpoint else None

    def behaviour_accuracy(self, model: str, behaviour: str) -> SplitAccuracy | None:
        """Return the accuracy of a model's traces with and without ``behaviour``, None if it was not counted."""
        checkpoint = self.checkpoints.get(model)
        return checkpoint.get("accuracy", {}).get(behaviour) if checkpoint else None

    @property
    def shows_behaviours(self) -> bool:
        """Whether any judged trace has any behaviour: without one there is nothing to draw."""
        return any(map(_shows_behaviour, self.checkpoints.values()))

    @property
    def single_run(self) -> Stage | None:
        """The only stage where the folder is a run's own; None for the folder of an experiment."""
        is_run = (self.dir / RUN_SETTINGS).is_file()
        return next(iter(self.stages.values()), None) if is_run else None

    @property
    def missing(self) -> list[str]:
        """One sentence for each part of the recipe, or of the single run, that is not there yet."""
        sentences = []
        single_run = self.single_run
        expected = {single_run.name: single_run.title} if single_run else STAGES
        for name, title in expected.items():
            stage = self.stages.get(name)
            if stage is None or not stage.metrics:
                sentences.append(f"{title}: no metrics yet.")
            elif stage.done < stage.total:
                sentences.append(f"{title}: {stage.done} of {stage.total} {stage.unit} done.")
        if single_run:
            return sentences
        unscored = [title for name, title in MODELS.items() if not self.scores.get(name)]
        if unscored:
            sentences.append(f"Evaluation: nothing yet of {', '.join(unscored)}.")
        if self.exported is None:
            sentences.append("Export: no final model yet.")
        return sentences


def _shows_behaviour(checkpoint: CheckpointRates) -> bool:
    for rates in checkpoint["behaviours"].values():
        emergence = rates["emergence"]
        if emergence and emergence["rate"]:
            return True
    return False


def read_experiment(folder: Path, iteration: int | None = None) -> Experiment:
    """Read what ``folder`` holds so far; the timeline of ``iteration`` is shown, else that of the last one.

    Raises:
        ExperimentError: there is no such folder, or nothing in it comes from a run.
    """
    if not folder.is_dir():
        problem = f"{folder}: there is no such folder; give the run folder of an experiment"
        raise ExperimentError(describe_folder(folder, "run") or problem)
    stages = _read_stages(folder)
    scores: dict[str, dict[str, EvaluationResult]] = {}
    for model_dir in sorted((folder / "eval").glob("*/")):
        scores[model_dir.name] = _read_json_files(model_dir)
    if not stages and not scores:
        parts = ", ".join([*STAGES, "eval"])
        problem = f"{folder}: neither a run folder (config.yaml) nor an experiment ({parts}) is in it"
        raise ExperimentError(describe_folder(folder, "run") or problem)
    measured = _read_json_files(folder / "measured")
    behaviours_file = folder / "behaviours/behaviours.json"
    behaviours = None
    if behaviours_file.is_file():
        behaviours = _read_json(behaviours_file)
    return Experiment(folder, stages, scores, measured, behaviours, iteration)


def _read_stages(folder: Path) -> dict[str, Stage]:
    """Read the run folders of an experiment, or ``folder`` itself if it is one."""
    if (folder / RUN_SETTINGS).is_file():
        stage = _read_stage(folder, "")
        return {stage.name: stage}
    return {name: _read_stage(path, name) for name, path in stage_folders(folder).items()}


def stage_folders(folder: Path) -> dict[str, Path]:
    """Return the run folder of each stage below ``folder``.

    A folder named like the stage is taken (``cold_start``), else the one that was changed last of those whose
    ``config.yaml`` is of the stage, whatever their names.  ``base`` goes by its name alone, because its settings are
    those of a cold start.
    """
    folders: dict[str, Path] = {}
    # By name first, so that of two files of one age the same is taken everywhere.
    paths = sorted(folder.glob("*/config.yaml"))
    # From the oldest to the newest: the last one assigned is the one that was changed last.
    for path in sorted(paths, key=_modification_time):
        if path.parent.name in STAGES:
            continue
        config: StageSettings | None = yaml.safe_load(path.read_text())
        stage = _stage_name(config) if config else None  # an empty file is None
        if stage:
            folders[stage] = path.parent
    for name in STAGES:
        own_folder = folder / name
        if own_folder.is_dir():
            folders[name] = own_folder
    # In the order of the recipe, which is that of the report.
    return {name: folders[name] for name in STAGES if name in folders}


def _modification_time(path: Path) -> float:
    return path.stat().st_mtime


def _stage_name(config: StageSettings) -> str | None:
    """Return the stage that has such settings, None if no stage has."""
    if "iterations" in config:
        return "rl"
    return "cold_start" if "packs_per_step" in config else None


def _read_stage(folder: Path, name: str) -> Stage:
    """Read a run folder; an empty ``name`` means that its settings name the stage."""
    settings = folder / "config.yaml"
    # A run that has just begun has neither file yet.
    config: StageSettings = {}
    if settings.is_file():
        config = yaml.safe_load(settings.read_text())
    metrics_file = folder / "metrics" / "train.jsonl"
    metrics = read_metrics(metrics_file) if metrics_file.is_file() else []
    if not name:
        name = "rl" if "iterations" in config else "cold_start"
    return Stage(name, folder, config, metrics)


def _read_json_files(folder: Path) -> dict[str, Any]:
    return {file.stem: _read_json(file) for file in sorted(folder.glob("*.json"))}


def _read_json(path: Path) -> Any:
    # Files of ours, whose shapes the callers know.
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ExperimentError(f"{path}: is not JSON ({error}); remove the file and make it anew") from error
