"""Write the README of an exported model from the experiment's folder: recipe, data, scores, how to use it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ovr_megatron.analysis.experiment import MODELS, Experiment, Stage
from ovr_megatron.evaluation.behaviours import BEHAVIOURS, PAIRS
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


def write_card(experiment: Experiment, export: Path) -> Path:
    """Write ``README.md`` into the folder of the exported model, and return its path.

    A ``README.md`` that somebody else wrote stays as it is.
    """
    path = export / NAME
    # Two signs of a card of ours: the record in the folder, and for folders copied without it, the signature.
    recorded = recorded_files(export) or frozenset()
    if path.exists() and NAME not in recorded and _SIGNATURE not in path.read_text(encoding="utf-8", errors="replace"):
        return path
    path = write_whole(export / NAME, render_card(experiment, export.name))
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
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {experiment.dir.resolve().name}: {model}",
        f"A {family.title} model trained by the recipe of Open Vision Reasoner: a linguistic cold start on text alone, "
        f"then PPO on images and text with verifiable rewards. {_SIGNATURE} (Megatron-Core, vLLM).",
        *(_render_stage(stage) for stage in experiment.stages.values() if stage.config),
        *_render_scores(experiment),
        *_render_behaviours(experiment),
        *_render_commands(experiment, model),
        "## Use\n\n```python\n"
        f"from transformers import AutoProcessor, {family.architecture}\n\n"
        f'model = {family.architecture}.from_pretrained("FOLDER", dtype="auto", device_map="auto")\n'
        'processor = AutoProcessor.from_pretrained("FOLDER")\n```\n\n'
        "The chat template opens `<think>`; the answer stands in `\\boxed{}` after `</think>`.",
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
    if sources := _get(stage.config, "data.sources"):
        lines += ["", "| data | share |", "|---|---|", *_share_lines(sources)]
    if settings := _shown_settings(stage):
        lines += ["", "| setting | |", "|---|---|", *(f"| `{key}` | {value} |" for key, value in settings.items())]
    if curriculum := stage.config.get("curriculum"):
        limits = (f"{step['max_tokens']:,} tokens until iteration {step['until']}" for step in curriculum)
        lines += ["", "Length limit: " + ", ".join(limits) + "."]
    return "\n".join(lines)


def _share_lines(sources: list[dict[str, Any]]) -> list[str]:
    weights = [float(source.get("weight", 1.0)) for source in sources]
    total = sum(weights)
    return [
        f"| {_source_name(source)} | {weight / total:.1%} |" for source, weight in zip(sources, weights, strict=True)
    ]


def _shown_settings(stage: Stage) -> dict[str, Any]:
    """Return the stage's settings for the card, and which layers it trained with if the run recorded that."""
    settings = {key: _get(stage.config, key) for key in _SETTINGS.get(stage.name, ())}
    layers = stage.dir / LAYERS
    if layers.is_file():
        settings["layers"] = layers.read_text(encoding="utf-8").strip()
    return {key: value for key, value in settings.items() if value is not None}


def _source_name(source: dict[str, Any]) -> str:
    """Return a source's name or path; of an absolute path only its last part, since folders tell of machines."""
    path = str(source["path"])
    is_absolute = path.startswith("/")
    name = source.get("name") or (Path(path).name if is_absolute else path)
    return str(name).replace("|", "\\|")


def _get(config: dict[str, Any], key: str) -> Any:
    """Return the setting at a dotted ``key``, None if there is none."""
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _table_head(first_cell: str) -> list[str]:
    return [f"{first_cell} " + " | ".join(MODELS.values()) + " |", "|---|" + "---|" * len(MODELS)]


def _render_scores(experiment: Experiment) -> Iterator[str]:
    if not experiment.sets:
        return
    lines = ["## Scores", "", "Greedy accuracy with Wilson's 95 % interval.", "", *_table_head("| problems |")]
    for name, title in experiment.sets.items():
        scores = [experiment.score(model, name) for model in MODELS]
        problems = max(score["problems"] for score in scores if score)
        lines.append(f"| {title} ({problems}) | " + " | ".join(map(_score_cell, scores)) + " |")
    yield "\n".join(lines)


def _score_cell(score: dict[str, Any] | None) -> str:
    if not score:
        return "not run"
    return f"{score['accuracy']:.1%} ({score['low']:.1%} to {score['high']:.1%})"


def _render_commands(experiment: Experiment, model: str) -> Iterator[str]:
    """Yield the commands that repeat each stage and each evaluation of ``model``; data are named without folders."""
    lines = []
    for stage in experiment.stages.values():
        if stage.config:
            command = "rl" if "iterations" in stage.config else "sft"
            folder = stage.dir.name if stage.dir != experiment.dir else "."
            lines.append(f"torchrun -m ovr_megatron {command} --config-dir {folder} --config-name config run.dir=NEW")
    for name, evaluation in experiment.scores.get(model, {}).items():
        data = shlex.quote(f"{name}={_source_name({'path': evaluation['source']})}")
        options = [f"--data {data} --limit {evaluation['problems']}", _evaluation_options(evaluation["settings"])]
        lines.append(f"ovr evaluate --model FOLDER {' '.join(options)} --out eval")
    if lines:
        yield "## Commands\n\n```bash\n" + "\n".join(lines) + "\n```"


def _evaluation_options(settings: dict[str, Any]) -> str:
    names = [name for name in _EVALUATION_OPTIONS if settings.get(name) is not None]
    return " ".join(f"--{name.replace('_', '-')} {settings[name]}" for name in names)


def _render_behaviours(experiment: Experiment) -> Iterator[str]:
    behaviours = experiment.behaviours
    if not behaviours:
        return
    judge = "by wording, an approximation" if behaviours["approximation"] else f"by {behaviours['judge']}"
    lines = ["## Cognitive behaviours", "", f"Transfer rates (visual over linguistic), judged {judge}.", ""]
    lines += _table_head("| |")
    for linguistic, _ in PAIRS:
        cells = []
        for model in MODELS:
            transfer = behaviours["checkpoints"].get(model, {}).get("transfer", {})
            cells.append(_rate_cell(transfer.get(linguistic) or {}))
        lines.append(f"| {BEHAVIOURS[linguistic].title} | " + " | ".join(cells) + " |")
    yield "\n".join(lines)


def _rate_cell(rate: dict[str, Any]) -> str:
    return f"{rate['value']:.1%}" if rate.get("value") is not None else "none"
