"""Detect a run that has nothing left to do from its manifests and file sizes, before anything heavy is loaded."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from ovr_megatron.checkpoint.manifest import CheckpointError, check, step_of
from ovr_megatron.config import ColdStartConfig, RLConfig, as_yaml
from ovr_megatron.config.changes import changed_settings


def report_finished(config: ColdStartConfig | RLConfig) -> bool:
    """Print, on the first rank, that the run of ``config`` is finished; return False where work is left.

    The files of the last checkpoint are compared by their sizes, not read.  Settings of ``config`` that the run did not
    have are printed, too: they have no effect.  A folder of another stage counts as not finished, so that the start of
    the run refuses it.
    """
    steps = planned_steps(config)
    if not steps:
        return False
    path = last_checkpoint(Path(config.run.dir) / "checkpoints", steps)
    if path is None:
        return False
    is_rl = isinstance(config, RLConfig)
    stored = _stored_settings(Path(config.run.dir))
    if stored and is_rl != ("iterations" in stored):
        return False
    # torch is not loaded yet, so the rank comes from the launcher's environment.
    if os.environ.get("RANK", "0") == "0":
        unit = "iterations" if is_rl else "steps"
        stage = "rl" if is_rl else "sft"
        print(f"finished: all {steps} {unit} are done; for another run give another run.dir, to go on more {unit}")
        if stored and (changes := _changes_without_effect(stored, config)):
            print(f"these settings are not those of the run and have no effect: {changes}")
        print(f"{stage}: {path}", flush=True)
    return True


def _stored_settings(run: Path) -> dict[str, Any] | None:
    """Return the settings in the ``config.yaml`` of a run folder, None without such a file."""
    try:
        settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return settings if isinstance(settings, dict) else None


def _changes_without_effect(stored: dict[str, Any], config: ColdStartConfig | RLConfig) -> str:
    """Return the settings of ``config`` that differ from those that the run stored, as one text."""
    current = yaml.safe_load(as_yaml(config))
    if current.get("steps") == 0:  # a run of epochs stores their number of steps
        current["steps"] = stored.get("steps", 0)
    return "; ".join(changed_settings(stored, current))


def last_checkpoint(directory: Path, steps: int) -> Path | None:
    """Return a run's own checkpoint of at least ``steps`` steps that is complete by its sizes, None without one."""
    for path in sorted(directory.glob("step_*"), reverse=True):
        step = step_of(path)
        if step is None or step < steps:
            continue
        try:
            manifest = check(path, digests=False)
        except CheckpointError:
            continue
        if manifest.step == step and "state" in manifest.extra:  # not an averaged one that was put there
            return path
    return None


def planned_steps(config: ColdStartConfig | RLConfig) -> int:
    """Return the number of steps or iterations, 0 where only the loop can say.

    A run of ``epochs`` writes its number of steps to its ``config.yaml`` when it begins. The number still holds if
    no other setting differs from the file.
    """
    if isinstance(config, RLConfig):
        return config.iterations if config.only == "all" else 0
    path = Path(config.run.dir) / "config.yaml"
    if config.steps or not path.is_file():
        return config.steps
    stored = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(stored, dict)
    stored_steps = stored.pop("steps", 0)
    current = dataclasses.asdict(config)
    del current["steps"]
    return int(stored_steps) if stored == current else 0
