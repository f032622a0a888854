"""Write the README of an exported model from the experiment's folder: recipe, data, scores, how to use it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict, cast

import yaml

from ovr_megatron.analysis.experiment import MODELS, Experiment, Stage
from ovr_megatron.evaluation.behaviours import BEHAVIOURS, PAIRS, TransferRate
from ovr_megatron.evaluation.scoring import Accuracy, EvaluationResult
from ovr_megatron.families import Family, default_family, family_of_folder
from ovr_megatron.families.config_json import ShapeError
from ovr_megatron.runtime.files import write_whole
from ovr_megatron.runtime.ownership import recorded_files, write_record
from ovr_megatron.runtime.runlog import LAYERS

NAME = "README.md"
_SIGNATURE = "Trained with `ovr_megatron`"
# Settings that the card shows, by stage; one that a run does not have is left out.
_SETTINGS = {
    "cold_start": ("optimizer.lr", "optimizer.schedule", "packs_per_step", "data.pack_tokens", "model.dtype"),
    "rl": ("algorithm.estimator", "optimizer.lr", "critic.optimizer.lr", "prompts", "responses", "model.dtype"),
}
# Settings of an evaluation that are options of `ovr evaluate`.
_EVALUATION_OPTIONS = ("samples", "temperature", "max_tokens", "metric", "template", "min_pixels", "max_pixels", "seed")

_USE = """## Use

```python
from transformers import AutoProcessor, {architecture}

model = {architecture}.from_pretrained("FOLDER", dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained("FOLDER")
```

The chat template opens `<think>`; the answer stands in `\\boxed{{}}` after `</think>`."""


class DataSource(TypedDict):
    """An entry of ``data.sources``, as far as the card shows it."""

    path: str
    name: NotRequired[str | None]
    weight: NotRequired[float]


def write_card(experiment: Experiment, export: Path) -> Path:
    """Write ``README.md`` into the folder of the exported model, and return its path.

    A ``README.md`` that somebody else wrote stays as it is.
    """
    path = export / NAME
    # Two signs of a card of ours: the record in the folder, and for folders copied without it, the signature.
    recorded = recorded_files(export) or frozenset()
    if path.exists() and NAME not in recorded:
        text = path.read_text(encoding="utf-8", errors="replace")
        if _SIGNATURE not in text:
            return path
    write_whole(path, render_card(experiment, export.name))
    write_record(export, NAME)
    return path


def render_card(experiment: Experiment, model: str) -> str:
    """Return the card of ``model``, one of the experiment's exports, without parts that the folder does not hold."""
    family = _family_of_export(experiment)
    front = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": [family.name, "open-vision-reasoner", "reasoning"],
    }
    front_text = yaml.safe_dump(front, sort_keys=False)
    stages = [_render_stage(stage) for stage in experiment.stages.values() if stage.config]
    parts = [
        f"---\n{front_text}---",
        f"# {experiment.dir.resolve().name}: {model}",
        f"A {family.title} model trained by the recipe of Open Vision Reasoner: a linguistic cold start on text alone, "
        f"then PPO on images and text with verifiable rewards. {_SIGNATURE} (Megatron-Core, vLLM).",
        *stages,
        *_render_scores(experiment),
        *_render_behaviours(experiment),
        *_render_commands(experiment, model),
        _USE.format(architecture=family.architecture),
        "This page was written by `ovr report`; the settings of every stage are in its `config.yaml`.",
    ]
    return "\n\n".join(parts) + "\n"


def _family_of_export(experiment: Experiment) -> Family:
    """Return the family of the exported model, the default one where its ``config.json`` names none."""
    if experiment.exported is None:
        return default_family()
    try:
        return family_of_folder(experiment.exported)
    except ShapeError:  # a card is written of whatever the folders hold
        return default_family()


def _render_stage(stage: Stage) -> str:
    lines = [f"## {stage.title}", "", f"{stage.done:,} {stage.unit} done."]
    # The configuration was checked when the run began: its entries have these fields.
    sources = cast(list[DataSource] | None, _setting(stage, "data.sources"))
    if sources:
        lines += ["", "| data | share |", "|---|---|"]
        lines += _share_lines(sources)
    settings = _shown_settings(stage)
    if settings:
        lines += ["", "| setting | |", "|---|---|"]
        lines += [f"| `{key}` | {value} |" for key, value in settings.items()]
    curriculum = stage.config.get("curriculum")
    if curriculum:
        limits = [f"{limit['max_tokens']:,} tokens until iteration {limit['until']}" for limit in curriculum]
        lines += ["", f"Length limit: {', '.join(limits)}."]
    return "\n".join(lines)


def _share_lines(sources: Sequence[DataSource]) -> list[str]:
    weights = [float(source.get("weight", 1.0)) for source in sources]
    total = sum(weights)
    lines = []
    for source, weight in zip(sources, weights, strict=True):
        name = _source_name(source["path"], source.get("name"))
        share = weight / total
        lines.append(f"| {name} | {share:.1%} |")
    return lines


def _shown_settings(stage: Stage) -> dict[str, object]:
    """Return the stage's settings for the card, and which layers it trained with if the run recorded that."""
    settings: dict[str, object] = {}
    for key in _SETTINGS.get(stage.name, ()):
        value = _setting(stage, key)
        if value is not None:
            settings[key] = value
    layers = stage.dir / LAYERS
    if layers.is_file():
        settings["layers"] = layers.read_text(encoding="utf-8").strip()
    return settings


def _source_name(path: str, name: str | None = None) -> str:
    """Return a source's name or path; of an absolute path only its last part, since folders tell of machines."""
    if not name:
        name = Path(path).name if path.startswith("/") else path
    return name.replace("|", "\\|")  # a bar would end the cell of the table


def _setting(stage: Stage, key: str) -> object:
    """Return the setting at a dotted ``key``, None if there is none."""
    value: object = stage.config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _table_head(first_cell: str) -> list[str]:
    columns = " | ".join(MODELS.values())
    return [f"{first_cell} {columns} |", "|---|" + "---|" * len(MODELS)]


def _table_row(first_cell: str, cells: Sequence[str]) -> str:
    columns = " | ".join(cells)
    return f"| {first_cell} | {columns} |"


def _render_scores(experiment: Experiment) -> Iterator[str]:
    if not experiment.sets:
        return
    lines = ["## Scores", "", "Greedy accuracy with Wilson's 95 % interval.", "", *_table_head("| problems |")]
    for name, title in experiment.sets.items():
        scores = [experiment.score(model, name) for model in MODELS]
        problem_counts = [score["problems"] for score in scores if score]
        problems = max(problem_counts)
        cells = [_score_cell(score) for score in scores]
        lines.append(_table_row(f"{title} ({problems})", cells))
    yield "\n".join(lines)


def _score_cell(score: Accuracy | None) -> str:
    if not score:
        return "not run"
    return f"{score['accuracy']:.1%} ({score['low']:.1%} to {score['high']:.1%})"


def _render_commands(experiment: Experiment, model: str) -> Iterator[str]:
    """Yield the commands that repeat each stage and each evaluation of ``model``; data are named without folders."""
    lines = []
    for stage in experiment.stages.values():
        if stage.config:
            lines.append(_stage_command(experiment, stage))
    for name, evaluation in experiment.scores.get(model, {}).items():
        lines.append(_evaluation_command(name, evaluation))
    if lines:
        commands = "\n".join(lines)
        yield f"## Commands\n\n```bash\n{commands}\n```"


def _stage_command(experiment: Experiment, stage: Stage) -> str:
    command = "rl" if "iterations" in stage.config else "sft"
    # A single run folder is an experiment, too: its configuration lies in the folder of the experiment.
    folder = stage.dir.name if stage.dir != experiment.dir else "."
    return f"torchrun -m ovr_megatron {command} --config-dir {folder} --config-name config run.dir=NEW"


def _evaluation_command(problem_set: str, evaluation: EvaluationResult) -> str:
    source = _source_name(evaluation["source"])
    data = shlex.quote(f"{problem_set}={source}")
    limit = evaluation["problems"]
    options = _evaluation_options(evaluation["settings"])
    return f"ovr evaluate --model FOLDER --data {data} --limit {limit} {options} --out eval"


def _evaluation_options(settings: Mapping[str, object]) -> str:
    options = []
    for name in _EVALUATION_OPTIONS:
        value = settings.get(name)
        if value is not None:
            option = name.replace("_", "-")
            options.append(f"--{option} {value}")
    return " ".join(options)


def _render_behaviours(experiment: Experiment) -> Iterator[str]:
    behaviours = experiment.behaviours
    if not behaviours:
        return
    judge = "by wording, an approximation" if behaviours["approximation"] else f"by {behaviours['judge']}"
    lines = ["## Cognitive behaviours", "", f"Transfer rates (visual over linguistic), judged {judge}.", ""]
    lines += _table_head("| |")
    for linguistic, _ in PAIRS:
        cells = [_rate_cell(experiment.transfer_rate(model, linguistic)) for model in MODELS]
        lines.append(_table_row(BEHAVIOURS[linguistic].title, cells))
    yield "\n".join(lines)


def _rate_cell(rate: TransferRate | None) -> str:
    if not rate or rate["value"] is None:
        return "none"
    return f"{rate['value']:.1%}"
