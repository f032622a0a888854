"""Save and resume a run: weights, optimizers and cursors of a step in one folder.

A checkpoint does not depend on the layout that wrote it::

    step_000300/
      policy/                a Hugging Face folder: config, tokenizer, processor, weights
      policy-exp_avg/ ...    Adam's moments (and float32 master weights) as safetensors, under the same names
      critic/ ...            likewise, with value_head.weight
      rng/rank_00000.safetensors ...
      loop/rank_00000.safetensors ...   arrays of the loop's own state, of the ranks that have some
      manifest.json          written last: files with hashes, step, the loop's own state
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from ovr_megatron.checkpoint.generators import set_generator_states
from ovr_megatron.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    OptimizerRecord,
    RunRecord,
    check,
    read_manifest,
    step_of,
)
from ovr_megatron.checkpoint.resume import ResumePoint, list_candidates, read_resume_point
from ovr_megatron.checkpoint.writing import (
    DiskQueue,
    NonFiniteError,
    PendingSave,
    Records,
    TensorFolder,
    generators_path,
    is_loop_file,
    publish,
    remove,
    start_writing,
)
from ovr_megatron.data.hub import local_folder
from ovr_megatron.engine import Engine
from ovr_megatron.families import ModelShape
from ovr_megatron.runtime.distributed import World, seed_everything
from ovr_megatron.runtime.logs import get_logger
from ovr_megatron.runtime.work_barrier import WorkBarrier
from ovr_megatron.weights.adapters import is_adapter_folder, read_adapter_settings
from ovr_megatron.weights.folder import ADAPTER_WEIGHTS, SHARD_BYTES, WeightFolder
from ovr_megatron.weights.table import TensorRow, published_name

logger = get_logger(__name__)

_REASONS = 3  # that a message spells out
_Problem = NonFiniteError | str | None
_RankResult = tuple[_Problem, Records]


def weights_of(path: str | Path, name: str = "policy") -> Path:
    """Return the Hugging Face folder behind ``path``: a checkpoint's ``name`` part, or ``path`` itself.

    A name on the Hugging Face hub is a folder in its cache (`local_folder`).

    Raises:
        CheckpointError: ``path`` is a checkpoint without that part.
        HubError: ``path`` is a name on the hub, which does not give the model.
    """
    directory = local_folder(path)
    part = directory / name
    if (part / "config.json").exists():
        return part
    is_model = (directory / "config.json").exists()
    if (directory / MANIFEST).exists() and not is_model:
        raise CheckpointError(f"{directory} is a checkpoint without a {name}; give one that has it")
    return directory


def check_weights(path: str | Path, world: World, name: str = "policy") -> None:
    """Check that the ``name`` part of the checkpoint ``path`` is whole, byte by byte.  A collective.

    The ranks share the files.  A Hugging Face folder has no hashes and passes.

    Raises:
        CheckpointError: on all ranks; names the file that is missing, cut off or changed.
    """
    problem: str | None = None
    share = (world.rank, world.size)
    try:
        is_checkpoint = weights_of(path, name) != local_folder(path)
        if is_checkpoint:
            check(path, under=name, share=share)
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
        weight_sizes = _sizes(engine.saved_rows, itemsize, engine.shape)
        weights = partial(_published, engine.weights, engine.shape)
        folders.append(TensorFolder(name, weight_sizes, weights, engine.adapter_config()))
        # Moments and master weights are float32 whatever the weights are, and frozen parameters have none.
        state_sizes = _sizes(engine.trained_rows, torch.float32.itemsize, engine.shape)
        for kind in engine.state_kinds:
            tensors = partial(_published, partial(engine.optimizer_state, kind), engine.shape)
            folders.append(TensorFolder(f"{name}-{kind}", state_sizes, tensors))
    return folders


def _published(tensors: Callable[[], Iterator[tuple[str, Tensor]]], shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """Yield ``tensors`` under the names that published folders of the model's family have.  A collective."""
    for name, tensor in tensors():
        yield published_name(name, shape), tensor


def _sizes(rows: Sequence[TensorRow], itemsize: int, shape: ModelShape) -> dict[str, int]:
    """Return the bytes of each Hugging Face tensor of ``rows``, by the name that it is stored under."""
    sizes: dict[str, int] = {}
    for row in rows:
        for name, size in zip(row.hf, row.sizes, strict=True):
            numel = math.prod(size)
            sizes[published_name(name, shape)] = numel * itemsize
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
    loop_arrays: Mapping[str, Tensor] | None = None,
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
        loop_arrays: what of the loop's state is too large for JSON, by name; that of this rank, which may have none.
    """
    # Through JSON now: the loop goes on changing its own state, and what is no JSON fails here and not in the manifest.
    saved_state = json.loads(json.dumps(state))
    optimizers: dict[str, OptimizerRecord] = {}
    for name, engine in engines.items():
        optimizers[name] = {
            "steps": engine.step_count,
            "parts": list(engine.state_kinds),
            "skipped": [engine.skipped, engine.skipped_in_a_row],
        }
        if engine.lora.rank:
            optimizers[name]["base"] = engine.base_fingerprint
    extra: RunRecord = {
        "state": saved_state,
        "ranks": world.size,
        "optimizers": optimizers,
    }
    if stage:
        extra["stage"] = stage
    folder_name = f"step_{step:06d}"
    pending = PendingSave(
        step=step,
        extra=extra,
        partial=directory / f".{folder_name}.partial",
        final=directory / folder_name,
    )
    folders = folders_of(engines)
    # All models of a run have one dtype.
    first_engine = next(iter(engines.values()))
    dtype = first_engine.config.params_dtype
    start_writing(pending, folders, hf_assets, dtype, world, queue, loop_arrays)
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
    records = {} if error else pending.records()
    local_result: _RankResult = (error, records)
    results: list[_RankResult] | None = None
    if world.is_main:
        results = [(None, {})] * world.size
    dist.gather_object(local_result, results)
    answer: list[_Problem] = [None]
    if results is not None:
        answer = [_publish_results(pending, results)]
        if answer[0]:
            shutil.rmtree(pending.partial, ignore_errors=True)
    # Every rank hears of the failure of any, so that all of them stop or go on together.
    dist.broadcast_object_list(answer, src=0)
    problem = answer[0]
    if isinstance(problem, NonFiniteError):
        raise problem
    return problem


def _publish_results(pending: PendingSave, results: Sequence[_RankResult]) -> _Problem:
    """Publish the checkpoint whose files all ranks have written; return the problem to report, if there is one."""
    problems = [problem for problem, _ in results if problem]
    # It says more than an error of a disk: the run must not go on.
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
    directory: Path,
    step: int,
    engines: dict[str, Engine],
    hf_assets: Path,
    state: Mapping[str, Any],
    world: World,
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
    folders: dict[int, Path] = {}
    for path in directory.glob("step_*"):
        step = step_of(path)
        if step is None:
            continue
        if newest_step is None or step <= newest_step:
            folders[step] = path
    steps = sorted(folders)
    for step in steps[:-keep_last]:
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
    broadcast: list[tuple[list[Path], list[str]]] = [([], [])]
    if world.is_main:
        broadcast = [list_candidates(directory, stage)]
    dist.broadcast_object_list(broadcast, src=0)
    paths, skipped = broadcast[0]
    share = (world.rank, world.size)
    checkpoint = None
    for path in paths:
        problem = _problem(path, share)
        # Each rank has read a share of the files: only together do they know whether all are whole.
        problems: list[str | None] = [None] * world.size
        dist.all_gather_object(problems, problem)
        reasons = [text for text in problems if text]
        if not reasons:
            checkpoint = read_resume_point(path, stage)
            break
        skipped.append(reasons[0])
    if checkpoint is None and skipped:
        first_reasons = "; ".join(skipped[:_REASONS])
        raise CheckpointError(
            f"{directory} has {len(skipped)} folders and no checkpoint that this run can go on from: "
            f"{first_reasons}. Put a whole checkpoint there, choose another run.dir, or move these "
            "folders elsewhere to begin anew"
        )
    if world.is_main:
        for reason in skipped:
            logger.info(f"skipping a checkpoint: {reason}")
    return checkpoint


def checkpoint_at(directory: Path, step: int, world: World) -> ResumePoint:
    """Return the checkpoint of ``step`` below ``directory``; its files are checked as in `find`.

    Raises:
        CheckpointError: it is not there or incomplete.
    """
    path = directory / f"step_{step:06d}"
    if not path.is_dir():
        names = sorted(folder.name for folder in directory.glob("step_*"))
        present = ", ".join(names) or "nothing"
        raise CheckpointError(f"{directory} has no checkpoint of step {step}, but {present}")
    share = (world.rank, world.size)
    check(path, share=share)
    return read_resume_point(path)


def _problem(path: Path, share: tuple[int, int]) -> str | None:
    try:
        check(path, share=share)
    except CheckpointError as error:
        return str(error)
    return None


def restore_generators(checkpoint: ResumePoint, world: World) -> None:
    """Restore this rank's random generators; with another number of ranks they are seeded anew."""
    manifest = read_manifest(checkpoint.path)
    if manifest.extra["ranks"] == world.size:
        path = checkpoint.path / generators_path(world.rank)
        states = load_file(path)
        set_generator_states(states)
    else:
        # By the step, so that the run does not draw the numbers of its first steps again.
        replica_seed = world.seed * 1009 + world.dp_rank
        seed_everything(replica_seed * 1_000_003 + checkpoint.step)


def read_loop_arrays(checkpoint: ResumePoint, world: World) -> list[dict[str, Tensor]]:
    """Return this rank's share of the loop's arrays: those of a rank that wrote them stay together.

    Any number of ranks share the files of any other.
    """
    manifest = read_manifest(checkpoint.path)
    names = sorted(name for name in manifest.files if is_loop_file(name))
    return [load_file(checkpoint.path / name) for name in names[world.rank :: world.size]]


def _check_adapters(folder: Path, engine: Engine, record: OptimizerRecord) -> None:
    """Refuse a part of a checkpoint whose adapters are not those of the run's settings.

    Nothing in the files would show it: an adapter fits any model of its sizes, and alpha is in no tensor.

    Raises:
        CheckpointError: names the setting.
    """
    has_adapters = is_adapter_folder(folder)
    if has_adapters != (engine.lora.rank > 0):
        kind = "adapters" if has_adapters else "entire weights"
        raise CheckpointError(
            f"{folder} holds {kind} and model.lora.rank is {engine.lora.rank}; go on with the setting that the run "
            "began with, or use another run.dir"
        )
    if not has_adapters:
        return
    settings = read_adapter_settings(folder)
    if settings.scale != engine.lora.scale:
        raise CheckpointError(
            f"{folder} has adapters of alpha / rank {settings.scale:g}, the settings make it {engine.lora.scale:g}; "
            "go on with the model.lora.alpha that the run began with, or use another run.dir"
        )
    if record.get("base") != engine.base_fingerprint:
        raise CheckpointError(
            f"{folder} has adapters that were trained beside the weights of {settings.base}, and those of "
            f"{engine.base_folder} are others; give the first as model.path, or use another run.dir"
        )


def restore(checkpoint: ResumePoint, engines: dict[str, Engine]) -> None:
    """Load weights and optimizers of ``checkpoint`` into ``engines``.

    Raises:
        CheckpointError: the checkpoint lacks one of the engines, or its adapters are not those of the settings.
    """
    path = checkpoint.path
    manifest = read_manifest(path)
    optimizers: dict[str, OptimizerRecord] = manifest.extra["optimizers"]
    for name, engine in engines.items():
        if name not in optimizers:
            raise CheckpointError(f"{path} has no {name}; it was written by another stage, use another run.dir")
        optimizer = optimizers[name]
        _check_adapters(path / name, engine, optimizer)
        # The files hold full tensors, and each engine takes the slices of its own layout.
        if engine.lora.rank:
            engine.load_adapter(WeightFolder(path / name, ADAPTER_WEIGHTS))
        else:
            engine.load(WeightFolder(path / name))
        states = {}
        for kind in optimizer["parts"]:
            states[kind] = WeightFolder(path / f"{name}-{kind}")
        engine.load_optimizer_state(states, optimizer["steps"])
        engine.skipped, engine.skipped_in_a_row = optimizer["skipped"]
