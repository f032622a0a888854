"""The files beside the weights of what a run saves: those of the model it started from, with the run's own settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ovr_megatron.data.processing import Processor
from ovr_megatron.weights.folder import copy_companions

_PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


def write_companions(source: Path, out: Path, processor: Processor) -> None:
    """Copy configuration, tokenizer and processor of ``source`` to ``out`` and write the run's settings into them.

    The chat template is the one that the run trains with, and the image budget is the run's, so that whoever
    serves the export gives the model what it was trained on.
    """
    copy_companions(source, out)
    template = str(processor.chat_template)
    (out / "chat_template.jinja").write_text(template)
    # Transformers 4 reads the template from these two.
    (out / "chat_template.json").write_text(json.dumps({"chat_template": template}, indent=2) + "\n")
    _edit(out / "tokenizer_config.json", {"chat_template": template})
    budget = {"min_pixels": processor.config.min_pixels, "max_pixels": processor.config.max_pixels}
    size = {"shortest_edge": budget["min_pixels"], "longest_edge": budget["max_pixels"]}
    for name in _PROCESSORS:
        _edit_budget(out / name, budget, size)


def _edit(path: Path, values: dict[str, Any]) -> None:
    if path.exists():
        path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2, ensure_ascii=False) + "\n")


def _edit_budget(path: Path, budget: dict[str, int], size: dict[str, int]) -> None:
    """Set the pixel budget wherever the file has one; Transformers 5 nests the processors in one file."""
    if not path.exists():
        return
    content = json.loads(path.read_text())
    nested = [part for part in content.values() if isinstance(part, dict) and ("size" in part or "min_pixels" in part)]
    for part in nested or [content]:
        part.update(budget)
        if "size" in part:
            part["size"] = size
    path.write_text(json.dumps(content, indent=2) + "\n")
