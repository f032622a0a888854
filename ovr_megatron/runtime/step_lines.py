"""Append a JSON line for each step of a run, and read such a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ovr_megatron.runtime.appended import AppendedFile
from ovr_megatron.runtime.files import write_whole
from ovr_megatron.runtime.json_lines import read_json_lines


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

    def write(self, step: int, record: Mapping[str, object]) -> None:
        """Append ``record`` under ``step``."""
        self.file.append(json.dumps({"step": step, **record}).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file; damaged ones are named and left out."""
    return [line for line in read_json_lines(path, "step") if isinstance(line["step"], int)]
