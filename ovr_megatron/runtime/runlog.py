"""Record the steps of a run: metrics as JSON lines and TensorBoard events, spikes as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard.summary import text as text_summary

from ovr_megatron.runtime.appended import AppendedFile
from ovr_megatron.runtime.events import EventFile
from ovr_megatron.runtime.files import write_whole
from ovr_megatron.runtime.json_lines import read_json_lines
from ovr_megatron.runtime.logs import NOTICE, get_logger

logger = get_logger(__name__)

LAYERS = "layers.txt"


def record_layers(run: Path, layers: str, cautions: Sequence[str]) -> None:
    """Print the implementation of the ``layers`` and its ``cautions``; write the former to ``RUN/layers.txt``."""
    logger.info(f"layers: {layers}")
    for caution in cautions:
        logger.log(NOTICE, f"note: {caution}")
    (run / LAYERS).write_text(f"{layers}\n")


class StepLines:
    """Appends a JSON line for each record.

    A run that resumes at a step removes the lines from that step on, so that no step has two.
    """

    def __init__(self, path: Path, resume_at: int = 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            earlier = [line for line in read_metrics(path) if line["step"] < resume_at]
            text = "".join(json.dumps(line) + "\n" for line in earlier)
            if text.encode() != path.read_bytes():
                write_whole(path, text)  # a kill here leaves the old lines or the new ones, never a part
        self.file = AppendedFile(path)

    def write(self, step: int, record: dict[str, Any]) -> None:
        """Append ``record`` under ``step``."""
        self.file.append(json.dumps({"step": step, **record}).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class RunLog:
    """Writes ``RUN/metrics/STAGE.jsonl``, ``RUN/tensorboard/STAGE`` and ``RUN/spikes.jsonl``."""

    def __init__(self, run: Path, stage: str, resume_at: int = 0):
        self.lines = StepLines(run / "metrics" / f"{stage}.jsonl", resume_at)
        self.spikes = StepLines(run / "spikes.jsonl", resume_at)
        self.events = EventFile(run / "tensorboard" / stage, resume_at or None)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Record ``values`` under ``step``, for example ``{"loss/train": 0.3}``."""
        self.lines.write(step, values)
        self.events.scalars(step, values)

    def text(self, step: int, name: str, text: str) -> None:
        """Record ``text`` under ``name`` in TensorBoard verbatim."""
        # TensorBoard renders Markdown, where an indented line is code.
        code = "".join(f"    {line}\n" for line in text.splitlines())
        self.events.summary(step, text_summary(name, code))

    def close(self) -> None:
        """Close every file."""
        self.lines.close()
        self.spikes.close()
        self.events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file; damaged ones are named and left out."""
    return [line for line in read_json_lines(path, "step") if isinstance(line["step"], int)]
