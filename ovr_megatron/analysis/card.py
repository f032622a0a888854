"""The README of an exported model, made from the experiment's folder: recipe, data, scores, how to use it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ovr_megatron.analysis.experiment import MODELS, Experiment, Stage
from ovr_megatron.evaluation.behaviours import BEHAVIOURS, PAIRS
from ovr_megatron.runtime.files import write_whole
from ovr_megatron.runtime.ownership import recorded_files, write_record
from ovr_megatron.runtime.runlog import LAYERS

NAME = "README.md"
_SIGNATURE = "Trained with `ovr_megatron`"
_TOLD = {
    "cold_start": ("optimizer.lr", "optimizer.schedule", "packs_per_step", "data.pack_tokens", "model.dtype"),
    "rl": ("algorithm.estimator", "optimizer.lr", "critic.optimizer.lr", "prompts", "responses", "model.dtype"),
}


_ASKED = ("samples", "temperature", "max_tokens", "metric", "template", "min_pixels", "max_pixels", "seed")


def write_card(experiment: Experiment, export: Path) -> Path:
    """Write ``README.md`` into the folder of the exported model, and return its path.

    A ``README.md`` that somebody else wrote stays as it is.
    """
    path = export / NAME
    recorded = recorded_files(export) or frozenset()
    if path.exists() and NAME not in recorded and _SIGNATURE not in path.read_text(encoding="utf-8", errors="replace"):
        return path
    path = write_whole(export / NAME, card(experiment, export.name))
    write_record(export, NAME)
    return path


def card(experiment: Experiment, model: str) -> str:
    """The card of ``model``, one of the experiment's exports; parts that the folder does not hold are left out."""
    front = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["qwen2_5_vl", "open-vision-reasoner", "reasoning"],
    }
    parts = [f"---\n{yaml.safe_dump(front, sort_keys=False)}---", f"# {experiment.dir.resolve().name}: {model}"]
    parts.append(
        "A Qwen2.5-VL model trained by the recipe of Open Vision Reasoner: a linguistic cold start on text alone, then "
        f"PPO on images and text with verifiable rewards. {_SIGNATURE} (Megatron-Core, vLLM)."
    )
    parts += [_stage(stage) for stage in experiment.stages.values() if stage.config]
    parts += [*_scores(experiment), *_behaviours(experiment), *_commands(experiment, model)]
    parts.append(
        "## Use\n\n```python\n"
        "from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration\n\n"
        'model = Qwen2_5_VLForConditionalGeneration.from_pretrained("FOLDER", dtype="auto", device_map="auto")\n'
        'processor = AutoProcessor.from_pretrained("FOLDER")\n```\n\n'
        "The chat template opens `<think>`; the answer stands in `\\boxed{}` after `</think>`."
    )
    parts.append("This page was written by `tools/report.py`; the settings of every stage are in its `config.yaml`.")
    return "\n\n".join(parts) + "\n"


def _stage(stage: Stage) -> str:
    lines = [f"## {stage.title}", "", f"{stage.done:,} {stage.unit} done."]
    if sources := _get(stage.config, "data.sources"):
        weights = sum(float(source.get("weight", 1.0)) for source in sources)
        lines += ["", "| data | share |", "|---|---|"]
        lines += [f"| {_source(s)} | {float(s.get('weight', 1.0)) / weights:.1%} |" for s in sources]
    told = [(key, _get(stage.config, key)) for key in _TOLD.get(stage.name, ())]
    layers = stage.dir / LAYERS
    if layers.is_file():
        told.append(("layers", layers.read_text(encoding="utf-8").strip()))
    if known := [(key, value) for key, value in told if value is not None]:
        lines += ["", "| setting | |", "|---|---|", *(f"| `{key}` | {value} |" for key, value in known)]
    if curriculum := stage.config.get("curriculum"):
        steps = (f"{part['max_tokens']:,} tokens until iteration {part['until']}" for part in curriculum)
        lines += ["", "Length limit: " + ", ".join(steps) + "."]
    return "\n".join(lines)


def _source(source: dict[str, Any]) -> str:
    """A source's name; of a path its last part, since folders tell of machines."""
    path = str(source["path"])
    named = source.get("name") or (path if path.startswith("puzzle:") or not path.startswith("/") else Path(path).name)
    return str(named).replace("|", "\\|")


def _get(config: dict[str, Any], key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _scores(experiment: Experiment) -> Iterator[str]:
    if experiment.sets:
        lines = ["## Scores", "", "Greedy accuracy with Wilson's 95 % interval.", ""]
        lines += ["| problems | " + " | ".join(MODELS.values()) + " |", "|---|" + "---|" * len(MODELS)]
        for name, title in experiment.sets.items():
            scores = [experiment.score(model, name) for model in MODELS]
            cells = [
                f"{score['accuracy']:.1%} ({score['low']:.1%} to {score['high']:.1%})" if score else "not run"
                for score in scores
            ]
            problems = max(score["problems"] for score in scores if score)
            lines.append(f"| {title} ({problems}) | " + " | ".join(cells) + " |")
        yield "\n".join(lines)


def _commands(experiment: Experiment, model: str) -> Iterator[str]:
    """How each stage is run again from its settings, and each evaluation of ``model``; data by their names alone."""
    lines = []
    for stage in experiment.stages.values():
        if stage.config:
            module = "rl" if "iterations" in stage.config else "coldstart"
            folder = stage.dir.name if stage.dir != experiment.dir else "."
            lines.append(f"torchrun -m ovr_megatron.{module} --config-dir {folder} --config-name config run.dir=NEW")
    for name, result in experiment.scores.get(model, {}).items():
        settings = result["settings"]
        told = " ".join(f"--{key.replace('_', '-')} {settings[key]}" for key in _ASKED if settings.get(key) is not None)
        data = shlex.quote(f"{name}={_source({'path': result['source']})}")
        told = f"--data {data} --limit {result['problems']} {told}"
        lines.append(f"python tools/evaluate.py --model FOLDER {told} --out eval")
    if lines:
        yield "## Commands\n\n```bash\n" + "\n".join(lines) + "\n```"


def _behaviours(experiment: Experiment) -> Iterator[str]:
    found = experiment.behaviours
    if found:
        how = "by wording, an approximation" if found["approximation"] else f"by {found['judge']}"
        lines = ["## Cognitive behaviours", "", f"Transfer rates (visual over linguistic), judged {how}.", ""]
        lines += ["| | " + " | ".join(MODELS.values()) + " |", "|---|" + "---|" * len(MODELS)]
        for linguistic, _ in PAIRS:
            rates = [found["checkpoints"].get(m, {}).get("transfer", {}).get(linguistic) or {} for m in MODELS]
            cells = [f"{rate['value']:.1%}" if rate.get("value") is not None else "none" for rate in rates]
            lines.append(f"| {BEHAVIOURS[linguistic].title} | " + " | ".join(cells) + " |")
        yield "\n".join(lines)
