"""Metrics of a run: one JSON line a step and TensorBoard events, both in the run folder."""

from __future__ import annotations

import json
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """Writes ``RUN/metrics/STAGE.jsonl`` and ``RUN/tensorboard/STAGE``.

    A run that resumes at step n drops the lines of steps from n on, so nothing is doubled.
    """

    def __init__(self, run: Path, stage: str, resume_at: int = 0):
        self.path = run / "metrics" / f"{stage}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(self.path) if line["step"] < resume_at] if self.path.exists() else []
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.file = self.path.open("a")
        self.writer = SummaryWriter(str(run / "tensorboard" / stage), purge_step=resume_at or None)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Record ``values`` under ``step``, for example ``{"loss/train": 0.3}``."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Flush and close both files."""
        self.file.close()
        self.writer.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics file; a last line cut off by a crash is left out."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
