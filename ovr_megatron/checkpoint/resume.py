"""Folders of checkpoints that a run may go on from, by their names and manifests; their files are not looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovr_megatron.checkpoint.manifest import CheckpointError, read_manifest, step_of
from ovr_megatron.checkpoint.writing import generators_path

_FORMER_STAGES = {"cold start": "SFT"}  # names in checkpoints of earlier versions


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint that a run goes on from.

    Attributes:
        path: its folder.
        step: steps or iterations done, so the index of the next one.
        state: the loop's cursors as they were saved.
    """

    path: Path
    step: int
    state: Mapping[str, Any]


def list_candidates(directory: Path, stage: str | None) -> tuple[list[Path], list[str]]:
    """Return the folders that may be checkpoints of this run, highest step first, and the reasons against the others.

    Hidden folders are unfinished or about to be removed.
    """
    try:
        folders = []
        for path in directory.iterdir():
            if not path.name.startswith(".") and path.is_dir():
                folders.append(path)
    except FileNotFoundError:
        return [], []  # a new run
    except OSError as error:
        return [], [f"{directory} cannot be read ({error.strerror})"]
    paths_by_step: list[tuple[int, Path]] = []
    skipped: list[str] = []
    for path in sorted(folders):
        try:
            point = read_resume_point(path, stage)
            paths_by_step.append((point.step, path))
        except CheckpointError as error:
            skipped.append(str(error))
    paths_by_step.sort(reverse=True)
    return [path for _, path in paths_by_step], skipped


def read_resume_point(path: Path, stage: str | None = None) -> ResumePoint:
    """Return the checkpoint ``path`` as a run resumes from it; its files are not looked at.

    Raises:
        CheckpointError: it is not called ``step_N``, or no run of ``stage`` has saved it under this name.
    """
    named_step = step_of(path)
    if named_step is None:
        raise CheckpointError(f"{path} is not called step_N, so it is left alone; rename it, if it is this run's")
    manifest = read_manifest(path)
    step = manifest.step
    extra = manifest.extra
    if not {"state", "ranks", "optimizers"} <= extra.keys():
        raise CheckpointError(
            f"{path} was averaged or converted and has no state of a run; begin a run from it with model.path={path}"
        )
    if step != named_step:
        raise CheckpointError(f"{path} is of step {step}; name it step_{step:06d}")
    # A checkpoint without the field is taken as one of this stage.
    saved_stage = extra.get("stage", stage)
    saved_stage = _FORMER_STAGES.get(saved_stage, saved_stage)
    if stage and saved_stage != stage:
        raise CheckpointError(f"{path} is of another stage ({saved_stage}); begin a run from it with model.path")
    for rank in range(extra["ranks"]):
        generators = generators_path(rank)
        if generators not in manifest.files:
            raise CheckpointError(f"{path} lacks {generators}; use another checkpoint")
    return ResumePoint(path, step, extra["state"])
