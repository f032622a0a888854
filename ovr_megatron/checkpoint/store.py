"""Saving and resuming a run: weights, optimizers and cursors of a step in one folder.

A checkpoint does not know the layout that wrote it::

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
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from ovr_megatron.checkpoint.generators import set_generator_states
from ovr_megatron.checkpoint.manifest import CheckpointError, check, read_manifest, step_of
from ovr_megatron.checkpoint.writing import RNG, DiskQueue, NonFiniteError, Part, Writing, begin, publish, remove
from ovr_megatron.engine import Engine
from ovr_megatron.runtime.distributed import World, seed_everything
from ovr_megatron.runtime.terminal import say
from ovr_megatron.runtime.work_barrier import WorkBarrier
from ovr_megatron.weights.folder import SHARD_BYTES, WeightFolder
from ovr_megatron.weights.table import Row

_REASONS = 3  # that a message spells out


@dataclass(frozen=True)
class Restored:
    """Where a run goes on: the next step and the loop's state as it was saved."""

    path: Path
    step: int
    state: dict[str, Any]


def weights_of(path: str | Path, name: str = "policy") -> Path:
    """The Hugging Face folder behind ``path``: a checkpoint's ``name`` part, or ``path`` itself."""
    inside = Path(path) / name
    return inside if (inside / "config.json").exists() else Path(path)


def parts_of(engines: dict[str, Engine]) -> list[Part]:
    """The folders that hold ``engines``: weights, then what the optimizer keeps."""
    parts = []
    for name, engine in engines.items():
        itemsize = engine.config.params_dtype.itemsize
        parts.append(Part(name, _sizes(engine.live.rows, itemsize), engine.weights))
        for kind in engine.state_kinds:
            sizes = _sizes(engine.trained_rows, torch.float32.itemsize)
            parts.append(Part(f"{name}-{kind}", sizes, partial(engine.optimizer_state, kind)))
    return parts


def _sizes(rows: Sequence[Row], itemsize: int) -> dict[str, int]:
    return {name: math.prod(size) * itemsize for row in rows for name, size in zip(row.hf, row.sizes, strict=True)}


def start(
    directory: Path,
    step: int,
    engines: dict[str, Engine],
    companions: Path,
    state: dict[str, Any],
    world: World,
    queue: DiskQueue,
    stage: str | None = None,
) -> Writing:
    """Copy the state of ``step`` and have it written below ``directory``, see `settle`; a collective.

    Args:
        directory: the run's checkpoint folder.
        step: steps or iterations done.
        engines: by name, ``policy`` and perhaps ``critic``.
        companions: the folder whose configuration, tokenizer and processor go along.
        state: the loop's cursors, as JSON.
        world: this process.
        queue: writes this rank's share.
        stage: of the run, so that no other stage goes on from it.
    """
    extra: dict[str, Any] = {"state": json.loads(json.dumps(state)), "ranks": world.size, "optimizers": {}}
    extra |= {"stage": stage} if stage else {}
    for name, engine in engines.items():
        extra["optimizers"][name] = {
            "steps": engine.step_count,
            "parts": list(engine.state_kinds),
            "skipped": [engine.skipped, engine.skipped_in_a_row],
        }
    writing = Writing(step, extra, directory / f".step_{step:06d}.partial", directory / f"step_{step:06d}")
    begin(writing, parts_of(engines), companions, next(iter(engines.values())).config.params_dtype, world, queue)
    return writing


def settle(writing: Writing, world: World) -> str | None:
    """Wait for every rank's files and publish the checkpoint; what went wrong, or None.  A collective.

    Of a checkpoint that could not be written nothing is left.

    Raises:
        NonFiniteError: on every rank, if a tensor holds a value that is not finite; nothing is published.
    """
    work = WorkBarrier(f"save/{writing.final}")
    writing.wait(work.step)
    work.wait()
    error = writing.error()
    mine = (error, {} if error else {name: record for job in writing.jobs for name, record in job.result().items()})
    told: list[Any] | None = [None] * world.size if world.is_main else None
    dist.gather_object(mine, told)
    answer: list[NonFiniteError | str | None] = [None]
    if told is not None:
        problems = [problem for problem, _ in told if problem]
        diverged = [problem for problem in problems if isinstance(problem, NonFiniteError)]
        answer = [(diverged or problems)[0] if problems else _published(writing, told)]
        if answer[0]:
            shutil.rmtree(writing.partial, ignore_errors=True)
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], NonFiniteError):
        raise answer[0]
    return answer[0]


def _published(writing: Writing, told: list[Any]) -> str | None:
    try:
        publish(writing, {name: record for _, records in told for name, record in records.items()})
    except OSError as error:
        return str(error)
    return None


def save(
    directory: Path, step: int, engines: dict[str, Engine], companions: Path, state: dict[str, Any], world: World
) -> Path:
    """`start` and `settle` in one; returns the folder.

    Raises:
        CheckpointError: it could not be written.
    """
    queue = DiskQueue(2 * SHARD_BYTES)
    writing = start(directory, step, engines, companions, state, world, queue)
    problem = settle(writing, world)
    queue.pool.shutdown()
    if problem:
        raise CheckpointError(f"the checkpoint of step {step} could not be written: {problem}")
    return writing.final


def prune(directory: Path, keep_last: int, keep_every: int = 0, newest_step: int | None = None) -> None:
    """Remove all checkpoints but the ``keep_last`` newest (0: all) and those of multiples of ``keep_every`` (0: none).

    Folders of steps above ``newest_step`` are no whole checkpoints, or the run would be there: they do not count.
    Folders with another name than ``step_N`` are not the run's and stay.
    """
    steps = {step: path for path in directory.glob("step_*") if (step := step_of(path)) is not None}
    counted = sorted(step for step in steps if newest_step is None or step <= newest_step)
    for step in counted[:-keep_last] if keep_last else []:
        if not keep_every or step % keep_every:
            remove(steps[step])


def find(directory: Path, world: World, stage: str | None = None) -> Restored | None:
    """Return the newest whole checkpoint below ``directory``, or None where no folder is there.  A collective.

    Folders that cannot be used are named and passed over.  Every byte is read to check the hashes; the ranks share
    the files.

    Args:
        directory: the run's checkpoint folder.
        world: this process.
        stage: of the run, see `start`; a checkpoint of another one is not used.

    Raises:
        CheckpointError: there are folders, but none that the run can go on from.
    """
    box: list[Any] = [_candidates(directory, stage) if world.is_main else None]
    dist.broadcast_object_list(box, src=0)
    paths, skipped = box[0]
    restored = None
    for path in paths:
        problems: list[str | None] = [None] * world.size
        dist.all_gather_object(problems, _problem(path, (world.rank, world.size)))
        reasons = [problem for problem in problems if problem]
        if not reasons:
            restored = _restored(path, stage)
            break
        skipped.append(reasons[0])
    if restored is None and skipped:
        raise CheckpointError(
            f"{directory} has {len(skipped)} folders and no checkpoint that this run can go on from: "
            f"{'; '.join(skipped[:_REASONS])}. Put a whole checkpoint there, choose another run.dir, or move these "
            "folders elsewhere to begin anew"
        )
    if world.is_main:
        for reason in skipped:
            say(f"skipping a checkpoint: {reason}", sys.stdout)
    return restored


def _candidates(directory: Path, stage: str | None) -> tuple[list[Path], list[str]]:
    """Return the folders that may be checkpoints of this run, highest step first, and why the others are none.

    Hidden folders are unfinished ones, or on their way out.
    """
    try:
        folders = sorted(path for path in directory.iterdir() if not path.name.startswith(".") and path.is_dir())
    except FileNotFoundError:
        return [], []
    except OSError as error:
        return [], [f"{directory} cannot be read ({error.strerror})"]
    paths: list[tuple[int, Path]] = []
    skipped: list[str] = []
    for path in folders:
        try:
            paths.append((_restored(path, stage).step, path))
        except CheckpointError as error:
            skipped.append(str(error))
    return [path for _, path in sorted(paths, reverse=True)], skipped


def _restored(path: Path, stage: str | None = None) -> Restored:
    """Return where a run goes on from the checkpoint ``path``; its files are not looked at.

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
    missing = [rank for rank in range(extra["ranks"]) if _generators(rank) not in manifest.files]
    if missing:
        raise CheckpointError(f"{path} lacks {_generators(missing[0])}; use another checkpoint")
    return Restored(path, manifest.step, extra["state"])


def _generators(rank: int) -> str:
    return f"{RNG}/rank_{rank:05d}.safetensors"


def at_step(directory: Path, step: int, world: World) -> Restored:
    """Return the checkpoint of ``step`` below ``directory``; its files are checked as in `find`.

    Raises:
        CheckpointError: it is not there or not whole.
    """
    path = directory / f"step_{step:06d}"
    if not path.is_dir():
        there = ", ".join(sorted(item.name for item in directory.glob("step_*"))) or "nothing"
        raise CheckpointError(f"{directory} has no checkpoint of step {step}, but {there}")
    check(path, share=(world.rank, world.size))
    return _restored(path)


def _problem(path: Path, share: tuple[int, int]) -> str | None:
    try:
        check(path, share=share)
    except CheckpointError as error:
        return str(error)
    return None


def restore_generators(found: Restored, world: World) -> None:
    """Put this rank's random generators where they were; in another number of ranks they are seeded anew."""
    if read_manifest(found.path).extra["ranks"] == world.size:
        set_generator_states(load_file(found.path / _generators(world.rank)))
    else:
        seed_everything((world.seed * 1009 + world.dp_rank) * 1_000_003 + found.step)


def restore(found: Restored, engines: dict[str, Engine]) -> None:
    """Load weights and optimizers of ``found`` into ``engines``.

    Raises:
        CheckpointError: the checkpoint lacks one of the engines.
    """
    optimizers = read_manifest(found.path).extra["optimizers"]
    for name, engine in engines.items():
        if name not in optimizers:
            raise CheckpointError(f"{found.path} has no {name}; it was written by another stage, use another run.dir")
        engine.load(WeightFolder(found.path / name))
        parts = {part: WeightFolder(found.path / f"{name}-{part}") for part in optimizers[name]["parts"]}
        engine.load_optimizer_state(parts, optimizers[name]["steps"])
        engine.skipped, engine.skipped_in_a_row = optimizers[name]["skipped"]
