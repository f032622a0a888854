"""Guard the folder of a run: one job at a time, of one stage; and record each configuration that it started with."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from ovr_megatron import config as configuration
from ovr_megatron.config import ConfigError
from ovr_megatron.config.changes import changed_settings
from ovr_megatron.runtime.files import write_whole
from ovr_megatron.runtime.lock import lock_folder
from ovr_megatron.runtime.logs import get_logger

logger = get_logger(__name__)

SETTINGS = "config.yaml"
SFT = "SFT"
PPO = "PPO"
ROLLOUTS = "rollouts alone"
LEARNING = "PPO from stored rollouts"
CRITIC = "the critic from stored rollouts"
REHEARSAL = "rehearsal of PPO"
REPLAY = "replay of an iteration"
_MODES = {"all": PPO, "rollout": ROLLOUTS, "train": LEARNING, "critic": CRITIC, "rehearsal": REHEARSAL}
# Stages that store nothing, or a report alone, and the stages whose folders they may use besides their own.
_ALSO_ALLOWED = {REHEARSAL: (PPO, ROLLOUTS, LEARNING, CRITIC), REPLAY: (PPO, LEARNING, CRITIC)}
# Folders that a run itself writes, below its own.
_RUN_SUBFOLDERS = (
    "checkpoints",
    "evaluation",
    "exports",
    "rollouts",
    "metrics",
    "companions",
    "tensorboard",
    "wandb",
    "mlflow",
    "data",
    "logs",
)


def stage_of(settings: Mapping[str, Any]) -> str | None:
    """Return the stage that resolved ``settings`` are for; None if they are no run's."""
    if "iterations" in settings:
        return _MODES.get(str(settings.get("only", "all")))
    return SFT if "packs_per_step" in settings else None


def enter(run: Path, stage: str, is_main: bool) -> None:
    """Lock the run folder until the process ends and check that it is one of ``stage``, or new.  A collective.

    Args:
        run: the folder; it is made if it is not there.
        stage: what the job does, see `stage_of`.
        is_main: whether this is the first rank.

    Raises:
        RunLockedError: another job works on the folder.
        ConfigError: it is a folder of another stage, or of no run.
    """
    lock_folder(run, is_main, reads_only=stage == REPLAY)
    # The first rank decides, so that all ranks raise or none: the others would wait in the next collective.
    problem = [_problem(run, stage) if is_main else None]
    dist.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise ConfigError(problem[0])


def _problem(run: Path, stage: str) -> str | None:
    """Return why a job of ``stage`` may not work in ``run``, None if it may."""
    path = run / SETTINGS
    try:
        settings = _read(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        return f"{path} cannot be read ({reason}); put the run's own back, or choose another run.dir"
    folder_stage = stage_of(settings)
    if folder_stage is None:
        return f"{path} is not the configuration of a run; choose another run.dir"
    if folder_stage != stage and folder_stage not in _ALSO_ALLOWED.get(stage, ()):
        return f"{run} is the folder of another job ({folder_stage}, this one is {stage}); choose another run.dir"
    return None


def run_folder_of(path: Path) -> Path:
    """Return the folder to lock for a job that writes below ``path``: the run's, if the run writes there, too."""
    path = path.resolve()
    for folder in (path, *path.parents):
        parts = path.relative_to(folder).parts
        if (not parts or parts[0] in _RUN_SUBFOLDERS) and (folder / SETTINGS).is_file():
            return folder
    return path


def record(config: Any, run: Path) -> None:
    """Write the resolved ``config`` to ``config.yaml``; a former one that differs stays as ``config.N.yaml``.

    The differences are printed, but for ``run.dir``: a folder may be moved.  The first rank calls it once the run has
    resumed.
    """
    path = run / SETTINGS
    text = configuration.as_yaml(config)
    changes: list[str] = []
    if path.exists():
        changes = list(changed_settings(_read(path), yaml.safe_load(text)))
    if changes:
        names = (run / f"config.{index}.yaml" for index in itertools.count(1))
        former = next(name for name in names if not name.exists())
        write_whole(former, path.read_text(encoding="utf-8"))
        differences = "; ".join(changes)
        logger.info(f"{run}: settings changed since its last start ({former.name} keeps them): {differences}")
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_whole(path, text)


def _read(path: Path) -> Mapping[str, object]:
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError("no settings are in it")
    return settings
