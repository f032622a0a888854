"""A checkpoint on its way to the disk: every rank copies its share of the tensors and writes it in the background.

The cut of the tensors into files depends on the model alone, and each file is one rank's, so that the bytes of a
checkpoint know neither the layout nor the number of ranks.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ovr_megatron.checkpoint.generators import generator_states
from ovr_megatron.checkpoint.manifest import FileRecord, file_record, write_manifest
from ovr_megatron.runtime import watchdog
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.terminal import say
from ovr_megatron.weights.folder import INDEX, copy_hf_assets, cut, shard_names, write_index
from ovr_megatron.weights.shard import PIECE, Pending, sync, write_shard

Records = dict[str, FileRecord]
RNG = "rng"


class NonFiniteError(ValueError):
    """A checkpoint whose tensors hold infinities or NaN; names the file and the tensor."""


@dataclass(frozen=True)
class Part:
    """One folder of a checkpoint: names and bytes of its tensors in order, and the collective that gives them whole."""

    folder: str
    sizes: dict[str, int]
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True)
class Shard:
    """A file of a checkpoint, relative to it, and the rank that writes it."""

    path: str
    names: tuple[str, ...]
    nbytes: int
    writer: int


@dataclass
class Writing:
    """A checkpoint that this rank's share is being written of; `Future.result` gives the records of its files."""

    step: int
    extra: dict[str, Any]
    partial: Path
    final: Path
    jobs: list[Future[Records]] = field(default_factory=list)

    @property
    def running(self) -> bool:
        """Whether a file of this rank is still being written."""
        return not all(job.done() for job in self.jobs)

    def wait(self, report: Callable[[], None]) -> None:
        """Wait for this rank's files; ``report`` is called after each."""
        for job in self.jobs:
            job.exception()
            report()

    def error(self) -> NonFiniteError | str | None:
        """What went wrong on this rank, once nothing is running; values that are not finite before all else."""
        errors = [error for job in self.jobs if (error := job.exception()) is not None]
        for error in errors:
            if not isinstance(error, (OSError, NonFiniteError)):
                raise error
        for error in errors:
            if isinstance(error, NonFiniteError):
                return error
        return str(errors[0]) if errors else None


class DiskQueue:
    """One thread that writes in order, from copies of at most ``limit`` bytes (one file, if that is larger)."""

    def __init__(self, limit: int):
        self.limit = limit
        self.pool = ThreadPoolExecutor(1, "checkpoint")
        self.held: list[tuple[int, Future[Records]]] = []

    def room(self, nbytes: int) -> None:
        """Wait until ``nbytes`` more may be held."""
        self.held = [(size, job) for size, job in self.held if not job.done()]
        while self.held and sum(size for size, _ in self.held) + nbytes > self.limit:
            self.held.pop(0)[1].exception()  # it is in `Writing.jobs`, too, where an error is told
            watchdog.touch()

    def submit(self, nbytes: int, job: Callable[[], Records]) -> Future[Records]:
        """Have ``job`` run after those before it."""
        future = self.pool.submit(job)
        self.held.append((nbytes, future))
        return future


def plan(parts: Sequence[Part], world: World) -> dict[str, list[Shard]]:
    """The files of every part, each given to the rank that has least to write, nodes in turn."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    turn = sorted(range(world.size), key=lambda rank: (rank % per_node, rank))
    load = dict.fromkeys(turn, 0)
    files: dict[str, list[Shard]] = {}
    for part in parts:
        names, sizes = list(part.sizes), list(part.sizes.values())
        ends = cut(sizes)
        files[part.folder] = []
        for name, (start, stop) in zip(shard_names(len(ends)), pairwise([0, *ends]), strict=True):
            writer = min(turn, key=lambda rank: load[rank])
            load[writer] += sum(sizes[start:stop])
            path = f"{part.folder}/{name}"
            files[part.folder].append(Shard(path, tuple(names[start:stop]), sum(sizes[start:stop]), writer))
    return files


def begin(
    writing: Writing, parts: Sequence[Part], companions: Path, dtype: torch.dtype, world: World, queue: DiskQueue
) -> None:
    """Copy this rank's share of ``parts`` and queue it; when it returns, the model may change.  A collective.

    Args:
        writing: gets the jobs.
        parts: what to write; those whose name has no ``-`` are models and get the ``companions``.
        companions: folder of configuration, tokenizer and processor.
        dtype: number format of the models' weights.
        world: this process.
        queue: writes.
    """
    files = plan(parts, world)
    if world.is_main:
        writing.jobs.append(queue.submit(0, lambda: _prepare(writing.partial, files, companions, dtype)))
        writing.jobs[-1].exception()
    dist.barrier()
    for part in parts:
        tensors = part.tensors()
        for shard in files[part.folder]:
            mine = shard.writer == world.rank
            if mine:
                queue.room(shard.nbytes)
            held = []
            for name in shard.names:
                found, tensor = next(tensors)
                assert found == name, f"{found} comes where {name} was planned"
                if mine:
                    held.append(_copy(name, tensor))
            watchdog.touch()
            if mine:
                writing.jobs.append(queue.submit(shard.nbytes, _Write(writing.partial, shard.path, held)))
        assert next(tensors, None) is None, f"{part.folder} has more tensors than planned"
    states = [_copy(name, state) for name, state in generator_states().items()]
    path = f"{RNG}/rank_{world.rank:05d}.safetensors"
    writing.jobs.append(queue.submit(0, _Write(writing.partial, path, states)))


def _copy(name: str, tensor: Tensor) -> Pending:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    copy.copy_(tensor.detach())
    return Pending(name, copy.dtype, tuple(copy.shape), lambda: copy)


class _Write:
    """Writes one shard, unless a value of it is not finite, and forgets its tensors."""

    def __init__(self, directory: Path, path: str, tensors: list[Pending]):
        self.directory, self.path, self.tensors = directory, path, tensors

    def __call__(self) -> Records:
        digest, file = hashlib.sha256(), self.directory / self.path
        try:
            for tensor in self.tensors:
                # In the thread that writes, as it costs less than the hash.
                if tensor.dtype.is_floating_point and not _is_finite(tensor.load()):
                    raise NonFiniteError(f"{self.path}: {tensor.name} has values that are not finite")
            write_shard(file, self.tensors, digest)
        finally:
            self.tensors = []
        return {self.path: FileRecord(file.stat().st_size, digest.hexdigest())}


def _is_finite(tensor: Tensor) -> bool:
    return all(bool(torch.isfinite(piece).all()) for piece in tensor.flatten().split(PIECE))


def _prepare(partial: Path, files: dict[str, list[Shard]], companions: Path, dtype: torch.dtype) -> Records:
    """Make the folders and write what is small: companions and indices."""
    shutil.rmtree(partial, ignore_errors=True)
    names: list[str] = []
    (partial / RNG).mkdir(parents=True)
    for folder, shards in files.items():
        (partial / folder).mkdir(parents=True)
        if "-" not in folder:
            names += [f"{folder}/{name}" for name in copy_hf_assets(companions, partial / folder, dtype=dtype)]
        if len(shards) > 1:
            held = {Path(shard.path).name: shard.names for shard in shards}
            write_index(partial / folder / INDEX, held, sum(shard.nbytes for shard in shards))
            names.append(f"{folder}/{INDEX}")
    return {name: file_record(partial / name) for name in names}


def publish(writing: Writing, records: Records) -> None:
    """Write the manifest over the files of all ranks and give the checkpoint its name; on one rank."""
    for path in (path for path in writing.partial.rglob("*") if path.is_dir()):
        sync(path)
    write_manifest(writing.partial, writing.step, writing.extra, records)
    sync(writing.partial)
    _set_aside(writing.final)
    writing.partial.rename(writing.final)
    sync(writing.final.parent)


def _set_aside(folder: Path) -> None:
    """Rename a folder that has the name of a new checkpoint, and from which the run did not go on.

    It is damaged, of a newer format, or was put there by somebody, who may want it.
    """
    if folder.exists():
        names = (folder.with_name(f"{folder.name}.unusable{number or ''}") for number in itertools.count())
        free = next(name for name in names if not name.exists())
        folder.rename(free)
        say(f"warning: {folder} could not be used and is now {free}; remove it by hand")


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, if it is there; it loses its name first, so that a kill leaves no half of it."""
    if checkpoint.exists():
        doomed = checkpoint.with_name(f".{checkpoint.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        checkpoint.rename(doomed)
        shutil.rmtree(doomed)
