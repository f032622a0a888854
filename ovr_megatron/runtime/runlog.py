"""Records of a run by step: metrics as JSON lines and TensorBoard events, and what else is kept line by line."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

LAYERS = "layers.txt"


def record_layers(run: Path, layers: str, cautions: Sequence[str]) -> None:
    """Say whose ``layers`` train, and what is not exact with them; the first stays in ``RUN/layers.txt``."""
    print(f"layers: {layers}", flush=True)
    for caution in cautions:
        print(f"note: {caution}", file=sys.stderr, flush=True)
    (run / LAYERS).write_text(f"{layers}\n")


class StepLines:
    """A JSON line for each record; a run that resumes at a step drops those from there on, so nothing is doubled."""

    def __init__(self, path: Path, resume_at: int = 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [line for line in read_metrics(path) if line["step"] < resume_at]
            partial = path.with_name(f".{path.name}.partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
            partial.rename(path)  # whoever is killed here has the old lines or the new ones
        self.file = path.open("a")

    def write(self, step: int, record: dict[str, Any]) -> None:
        """Append ``record`` under ``step``."""
        self.file.write(json.dumps({"step": step, **record}) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class RunLog:
    """Writes ``RUN/metrics/STAGE.jsonl``, ``RUN/tensorboard/STAGE`` and ``RUN/spikes.jsonl``."""

    def __init__(self, run: Path, stage: str, resume_at: int = 0):
        self.lines = StepLines(run / "metrics" / f"{stage}.jsonl", resume_at)
        self.spikes = StepLines(run / "spikes.jsonl", resume_at)
        self.writer = SummaryWriter(str(run / "tensorboard" / stage), purge_step=resume_at or None)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Record ``values`` under ``step``, for example ``{"loss/train": 0.3}``."""
        self.lines.write(step, values)
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        """Record ``text`` under ``name`` in TensorBoard as it stands: an indented line is code in Markdown."""
        self.writer.add_text(name, "".join(f"    {line}\n" for line in text.splitlines()), step)

    def close(self) -> None:
        """Flush and close every file."""
        self.lines.close()
        self.spikes.close()
        self.writer.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line cut off by a crash is left out."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
