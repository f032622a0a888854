"""A run that has nothing left to do, told before anything heavy is loaded: manifests and sizes are all that is read."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from omegaconf import OmegaConf

from ovr_megatron.checkpoint.manifest import CheckpointError, check, step_of
from ovr_megatron.config import ColdStartConfig, RLConfig


def tell_finished(config: ColdStartConfig | RLConfig) -> bool:
    """Print, on the first rank, that the run of ``config`` is finished; return False where work is left.

    The files of the last checkpoint are compared by their sizes, not read.
    """
    steps = planned_steps(config)
    if not steps:
        return False
    path = last_checkpoint(Path(config.run.dir) / "checkpoints", steps)
    if path is None:
        return False
    if os.environ.get("RANK", "0") == "0":
        what = "iterations" if isinstance(config, RLConfig) else "steps"
        print(f"finished: all {steps} {what} are done; for another run give another run.dir, to go on more {what}")
        print(f"{'rl' if isinstance(config, RLConfig) else 'cold start'}: {path}", flush=True)
    return True


def last_checkpoint(directory: Path, steps: int) -> Path | None:
    """Return a run's own checkpoint of at least ``steps`` steps that is whole by its sizes, None if there is none."""
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

    The steps of ``epochs`` stand in the run's ``config.yaml`` once it has begun, and are still those if nothing else
    in it differs.
    """
    if isinstance(config, RLConfig):
        return config.iterations if config.only == "all" else 0
    path = Path(config.run.dir) / "config.yaml"
    if config.steps or not path.is_file():
        return config.steps
    stored = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(stored, dict)
    steps = stored.pop("steps", 0)
    asked = dataclasses.asdict(config)
    del asked["steps"]
    return int(steps) if stored == asked else 0
