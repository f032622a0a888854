"""Save and resume a run: weights, optimizers and cursors of a step in one folder.

A checkpoint does not depend on the layout that wrote it::

    step_000300/
      policy/                a Hugging Face folder: config, tokenizer, processor, weights
      policy-exp_avg/ ...    Adam's moments (and float32 master weights) as safetensors, under the same names
      critic/ ...            likewise, with value_head.weight
      rng/rank_00000.safetensors ...
      manifest.json          written last: files with hashes, step, the loop's own state
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from ovr_megatron.checkpoint.generators import set_generator_states
from ovr_megatron.checkpoint.manifest import CheckpointError, RunRecord, check, read_manifest, step_of
from ovr_megatron.checkpoint.writing import (
    RNG,
    DiskQueue,
    NonFiniteError,
    PendingSave,
    Records,
    TensorFolder,
    publish,
    remove,
    start_writing,
)
from ovr_megatron.engine import Engine
from ovr_megatron.runtime.distributed import World, seed_everything
from ovr_megatron.runtime.logs import get_logger
from ovr_megatron.runtime.work_barrier import WorkBarrier
from ovr_megatron.weights.adapters import is_adapter_folder
from ovr_megatron.weights.folder import ADAPTER_WEIGHTS, SHARD_BYTES, WeightFolder
from ovr_megatron.weights.table import TensorRow

logger = get_logger(__name__)

_REASONS = 3  # that a message spells out


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


def weights_of(path: str | Path, name: str = "policy") -> Path:
    """Return the Hugging Face folder behind ``path``: a checkpoint's ``name`` part, or ``path`` itself.

    Raises:
        CheckpointError: ``path`` is a checkpoint without that part.
    """
    directory = Path(path)
    if (directory / name / "config.json").exists():
        return directory / name
    if (directory / "manifest.json").exists() and not (directory / "config.json").exists():
        raise CheckpointError(f"{directory} is a checkpoint without a {name}; give one that has it")
    return directory


def check_weights(path: str | Path, world: World, name: str = "policy") -> None:
    """Check that the ``name`` part of the checkpoint ``path`` is whole, byte by byte.  A collective.

    The ranks share the files.  A Hugging Face folder has no hashes and passes.

    Raises:
        CheckpointError: on all ranks; names the file that is missing, cut off or changed.
    """
    problem: str | None = None
    try:
        is_checkpoint = weights_of(path, name) != Path(path)
        if is_checkpoint:
            check(path, under=name, share=(world.rank, world.size))
    except CheckpointError as error:
        problem = str(error)
    # A rank that raised alone would leave the others waiting in their next collective.
    problems: list[str | None] = [None] * world.size
    dist.all_gather_object(problems, problem)
    reasons = [text for text in problems if text]
    if reasons:
        raise CheckpointError(reasons[0])


def folders_of(engines: dict[str, Engine]) -> list[TensorFolder]:
    """Return the folders that hold ``engines``: weights, then the states of the optimizer."""
    folders = []
    for name, engine in engines.items():
        itemsize = engine.config.params_dtype.itemsize
        sizes = _sizes(engine.saved_rows, itemsize)
        folders.append(TensorFolder(name, sizes, engine.weights, engine.adapter_config()))
        for kind in engine.state_kinds:
            sizes = _sizes(engine.trained_rows, torch.float32.itemsize)
            folders.append(TensorFolder(f"{name}-{kind}", sizes, partial(engine.optimizer_state, kind)))
    return folders


def _sizes(rows: Sequence[TensorRow], itemsize: int) -> dict[str, int]:
    """Return the bytes of each Hugging Face tensor of ``rows``."""
    sizes: dict[str, int] = {}
    for row in rows:
        for name, shape in zip(row.hf, row.sizes, strict=True):
            sizes[name] = math.prod(shape) * itemsize
    return sizes


def start_save(
    directory: Path,
    step: int,
    engines: dict[str, Engine],
    hf_assets: Path,
    state: Mapping[str, Any],
    world: World,
    queue: DiskQueue,
    stage: str | None = None,
) -> PendingSave:
    """Copy the state of ``step`` and write it below ``directory`` in the background, see `finish_save`.  A collective.

    Args:
        directory: the run's checkpoint folder.
        step: steps or iterations done.
        engines: by name, ``policy`` and perhaps ``critic``.
        hf_assets: the folder whose configuration, tokenizer and processor go along.
        state: the loop's cursors, as JSON.
        world: this process.
        queue: writes this rank's share.
        stage: of the run, so that no other stage goes on from it.
    """
    # Through JSON now: the loop goes on changing its own state, and what is no JSON fails here and not in the manifest.
    extra: RunRecord = {"state": json.loads(json.dumps(state)), "ranks": world.size, "optimizers": {}}
    if stage:
        extra["stage"] = stage
    for name, engine in engines.items():
        extra["optimizers"][name] = {
            "steps": engine.step_count,
            "parts": list(engine.state_kinds),
            "skipped": [engine.skipped, engine.skipped_in_a_row],
        }
    pending = PendingSave(step, extra, directory / f".step_{step:06d}.partial", directory / f"step_{step:06d}")
    dtype = next(iter(engines.values())).config.params_dtype
    start_writing(pending, folders_of(engines), hf_assets, dtype, world, queue)
    return pending


def finish_save(pending: PendingSave, world: World) -> str | None:
    """Wait for every rank's files and publish the checkpoint; return what went wrong, or None.  A collective.

    Nothing is left of a checkpoint that could not be written.

    Raises:
        NonFiniteError: on every rank, if a tensor holds a value that is not finite; nothing is published.
    """
    # Ranks may be minutes apart: the wait lasts for as long as any of them reports files.
    barrier = WorkBarrier(f"save/{pending.final}")
    pending.wait(barrier.step)
    barrier.wait()
    error = pending.error()
    local_result = (error, {} if error else pending.records())
    results: list[Any] | None = [None] * world.size if world.is_main else None
    dist.gather_object(local_result, results)
    answer: list[NonFiniteError | str | None] = [None]
    if results is not None:
        answer = [_publish_results(pending, results)]
        if answer[0]:
            shutil.rmtree(pending.partial, ignore_errors=True)
    # Every rank hears of the failure of any, so that all of them stop or go on together.
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], NonFiniteError):
        raise answer[0]
    return answer[0]


def _publish_results(pending: PendingSave, results: list[Any]) -> NonFiniteError | str | None:
    """Publish the checkpoint whose files all ranks have written; return the problem to report, if there is one.

    ``results`` has a pair for each rank: its error and the records of its files.
    """
    problems = [problem for problem, _ in results if problem]
    for problem in problems:
        if isinstance(problem, NonFiniteError):
            return problem
    if problems:
        return problems[0]
    records: Records = {}
    for _, rank_records in results:
        records |= rank_records
    try:
        publish(pending, records)
    except OSError as error:
        return str(error)
    return None


def save(
    directory: Path, step: int, engines: dict[str, Engine], hf_assets: Path, state: Mapping[str, Any], world: World
) -> Path:
    """Write a checkpoint, wait for it, and return its folder.  A collective.

    Raises:
        CheckpointError: it could not be written.
    """
    queue = DiskQueue(2 * SHARD_BYTES)
    pending = start_save(directory, step, engines, hf_assets, state, world, queue)
    problem = finish_save(pending, world)
    queue.pool.shutdown()
    if problem:
        raise CheckpointError(f"the checkpoint of step {step} could not be written: {problem}")
    return pending.final


def prune(directory: Path, keep_last: int, keep_every: int = 0, newest_step: int | None = None) -> None:
    """Remove all checkpoints but the ``keep_last`` newest (0: all) and those of multiples of ``keep_every`` (0: none).

    Folders of steps above ``newest_step`` are incomplete, or the run would have resumed there: they do not count.
    Folders with another name than ``step_N`` are not the run's and stay.
    """
    if not keep_last:
        return
    folders = {step: path for path in directory.glob("step_*") if (step := step_of(path)) is not None}
    counted = sorted(step for step in folders if newest_step is None or step <= newest_step)
    for step in counted[:-keep_last]:
        if not keep_every or step % keep_every:
            remove(folders[step])


def find(directory: Path, world: World, stage: str | None = None) -> ResumePoint | None:
    """Return the newest complete checkpoint below ``directory``, or None where no folder is there.  A collective.

    Folders that cannot be used are named and passed over.  Every byte is read to check the hashes; the ranks share
    the files.

    Args:
        directory: the run's checkpoint folder.
        world: this process.
        stage: of the run, see `start_save`; a checkpoint of another one is not used.

    Raises:
        CheckpointError: there are folders, but none that the run can go on from.
    """
    # One rank lists the folders: on a network disk others might see another list, and the loop below is collective.
    broadcast: list[Any] = [_candidates(directory, stage) if world.is_main else None]
    dist.broadcast_object_list(broadcast, src=0)
    paths, skipped = broadcast[0]
    checkpoint = None
    for path in paths:
        problems: list[str | None] = [None] * world.size
        dist.all_gather_object(problems, _problem(path, (world.rank, world.size)))
        reasons = [problem for problem in problems if problem]
        if not reasons:
            checkpoint = _resume_point(path, stage)
            break
        skipped.append(reasons[0])
    if checkpoint is None and skipped:
        raise CheckpointError(
            f"{directory} has {len(skipped)} folders and no checkpoint that this run can go on from: "
            f"{'; '.join(skipped[:_REASONS])}. Put a whole checkpoint there, choose another run.dir, or move these "
            "folders elsewhere to begin anew"
        )
    if world.is_main:
        for reason in skipped:
            logger.info(f"skipping a checkpoint: {reason}")
    return checkpoint


def _candidates(directory: Path, stage: str | None) -> tuple[list[Path], list[str]]:
    """Return the folders that may be checkpoints of this run, highest step first, and the reasons against the others.

    Hidden folders are unfinished or about to be removed.
    """
    try:
        folders = sorted(path for path in directory.iterdir() if not path.name.startswith(".") and path.is_dir())
    except FileNotFoundError:
        return [], []  # a new run
    except OSError as error:
        return [], [f"{directory} cannot be read ({error.strerror})"]
    paths: list[tuple[int, Path]] = []
    skipped: list[str] = []
    for path in folders:
        try:
            step = _resume_point(path, stage).step
            paths.append((step, path))
        except CheckpointError as error:
            skipped.append(str(error))
    return [path for _, path in sorted(paths, reverse=True)], skipped


def _resume_point(path: Path, stage: str | None = None) -> ResumePoint:
    """Return the checkpoint ``path`` as a run resumes from it; its files are not looked at.

    Raises:
        CheckpointError: it is not called ``step_N``, or no run of ``stage`` has saved it under this name.
    """
    if step_of(path) is None:
        raise CheckpointError(f"{path} is not called step_N, so it is left alone; rename it, if it is this run's")
    manifest = read_manifest(path)
    extra = manifest.extra
    if not {"state", "ranks", "optimizers"} <= extra.keys():
        raise CheckpointError(
            f"{path} was averaged or converted and has no state of a run; begin a run from it with model.path={path}"
        )
    if manifest.step != step_of(path):
        raise CheckpointError(f"{path} is of step {manifest.step}; name it step_{manifest.step:06d}")
    if stage and extra.get("stage", stage) != stage:
        raise CheckpointError(f"{path} is of another stage ({extra['stage']}); begin a run from it with model.path")
    for rank in range(extra["ranks"]):
        if _generators_path(rank) not in manifest.files:
            raise CheckpointError(f"{path} lacks {_generators_path(rank)}; use another checkpoint")
    return ResumePoint(path, manifest.step, extra["state"])


def _generators_path(rank: int) -> str:
    return f"{RNG}/rank_{rank:05d}.safetensors"


def checkpoint_at(directory: Path, step: int, world: World) -> ResumePoint:
    """Return the checkpoint of ``step`` below ``directory``; its files are checked as in `find`.

    Raises:
        CheckpointError: it is not there or incomplete.
    """
    path = directory / f"step_{step:06d}"
    if not path.is_dir():
        present = ", ".join(sorted(folder.name for folder in directory.glob("step_*"))) or "nothing"
        raise CheckpointError(f"{directory} has no checkpoint of step {step}, but {present}")
    check(path, share=(world.rank, world.size))
    return _resume_point(path)


def _problem(path: Path, share: tuple[int, int]) -> str | None:
    try:
        check(path, share=share)
    except CheckpointError as error:
        return str(error)
    return None


def restore_generators(checkpoint: ResumePoint, world: World) -> None:
    """Restore this rank's random generators; with another number of ranks they are seeded anew."""
    if read_manifest(checkpoint.path).extra["ranks"] == world.size:
        set_generator_states(load_file(checkpoint.path / _generators_path(world.rank)))
    else:
        # By the step, so that the run does not draw the numbers of its first steps again.
        seed_everything((world.seed * 1009 + world.dp_rank) * 1_000_003 + checkpoint.step)


def restore(checkpoint: ResumePoint, engines: dict[str, Engine]) -> None:
    """Load weights and optimizers of ``checkpoint`` into ``engines``.

    Raises:
        CheckpointError: the checkpoint lacks one of the engines.
    """
    optimizers = read_manifest(checkpoint.path).extra["optimizers"]
    for name, engine in engines.items():
        if name not in optimizers:
            raise CheckpointError(
                f"{checkpoint.path} has no {name}; it was written by another stage, use another run.dir"
            )
        if is_adapter_folder(checkpoint.path / name) != (engine.lora.rank > 0):
            kind = "adapters" if engine.lora.rank == 0 else "entire weights"
            raise CheckpointError(
                f"{checkpoint.path} holds {kind} and model.lora.rank is {engine.lora.rank}; go on with the setting "
                "that the run began with, or use another run.dir"
            )
        optimizer = optimizers[name]
        # The files hold full tensors, and each engine takes the slices of its own layout.
        folder = checkpoint.path / name
        if is_adapter_folder(folder):
            engine.load_adapter(WeightFolder(folder, ADAPTER_WEIGHTS))
        else:
            engine.load(WeightFolder(folder))
        states = {kind: WeightFolder(checkpoint.path / f"{name}-{kind}") for kind in optimizer["parts"]}
        engine.load_optimizer_state(states, optimizer["steps"])
        engine.skipped, engine.skipped_in_a_row = optimizer["skipped"]
