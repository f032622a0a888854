"""Write a checkpoint: every rank copies its share of the tensors and writes it in the background.

How tensors are cut into files depends on the model alone, and each file is written by one rank. So the bytes of a
checkpoint depend neither on the layout nor on the number of ranks.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ovr_megatron.checkpoint.generators import generator_states
from ovr_megatron.checkpoint.manifest import FileRecord, RunRecord, file_record, write_manifest
from ovr_megatron.runtime import watchdog
from ovr_megatron.runtime.balance import balance
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.logs import get_logger
from ovr_megatron.weights.adapters import AdapterConfig, write_adapter_config
from ovr_megatron.weights.folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX,
    copy_hf_assets,
    cut,
    shard_names,
    write_index,
)
from ovr_megatron.weights.shard import PIECE, Pending, sync, write_shard

logger = get_logger(__name__)

Records = dict[str, FileRecord]
RNG = "rng"
LOOP = "loop"


class NonFiniteError(ValueError):
    """A checkpoint whose tensors hold infinities or NaN; names the file and the tensor."""


@dataclass(frozen=True)
class TensorFolder:
    """One folder of a checkpoint, with the tensors that go into it.

    Attributes:
        folder: its name, relative to the checkpoint.
        sizes: bytes of each tensor by name, in the order of the files.
        tensors: a collective that yields the full tensors in that order.
        adapter: PEFT's configuration, where the tensors are those of adapters.
    """

    folder: str
    sizes: dict[str, int]
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    adapter: AdapterConfig | None = None


@dataclass(frozen=True)
class Shard:
    """A file of a checkpoint, relative to it, and the rank that writes it."""

    path: str
    names: tuple[str, ...]
    nbytes: int
    writer: int = 0


@dataclass
class PendingSave:
    """A checkpoint that is being written, as seen by this rank.

    Attributes:
        step: the step that it is of.
        extra: what the manifest holds beside the files.
        partial: the hidden folder that is written to.
        final: the folder's name once it is complete.
        jobs: this rank's files; `Future.result` returns their records.
    """

    step: int
    extra: RunRecord
    partial: Path
    final: Path
    jobs: list[Future[Records]] = field(default_factory=list)

    @property
    def running(self) -> bool:
        """Whether a file of this rank is still being written."""
        return not all(job.done() for job in self.jobs)

    def wait(self, report: Callable[[], None]) -> None:
        """Wait for this rank's files and call ``report`` after each."""
        for job in self.jobs:
            job.exception()  # waits as `result` does, and leaves the raising to `error`
            report()

    def error(self) -> NonFiniteError | str | None:
        """Return what went wrong on this rank, once nothing is running; a value that is not finite comes first."""
        errors: list[BaseException] = []
        for job in self.jobs:
            error = job.exception()
            if error is not None:
                errors.append(error)
        # An error of a disk is reported, so that the run may go on; any other is a defect and ends it.
        for error in errors:
            if not isinstance(error, (OSError, NonFiniteError)):
                raise error
        for error in errors:
            if isinstance(error, NonFiniteError):
                return error
        if errors:
            return str(errors[0])
        return None

    def records(self) -> Records:
        """Return the records of this rank's files, once all of them are written."""
        records: Records = {}
        for job in self.jobs:
            records |= job.result()
        return records


class DiskQueue:
    """One thread that writes files in order, from copies of at most ``limit`` bytes (one file, if that is larger)."""

    def __init__(self, limit: int):
        self.limit = limit
        self.pool = ThreadPoolExecutor(1, "checkpoint")
        self.queued: list[tuple[int, Future[Records]]] = []

    def wait_for_room(self, nbytes: int) -> None:
        """Wait until copies of ``nbytes`` more fit within the limit."""
        self.queued = [(size, job) for size, job in self.queued if not job.done()]
        queued_bytes = sum(size for size, _ in self.queued)
        while self.queued and queued_bytes + nbytes > self.limit:
            size, oldest = self.queued.pop(0)
            oldest.exception()  # only a wait: the job is in `PendingSave.jobs`, too, where its error is reported
            queued_bytes -= size
            watchdog.touch()

    def submit(self, nbytes: int, job: Callable[[], Records]) -> Future[Records]:
        """Run ``job``, which holds copies of ``nbytes``, after the jobs before it."""
        future = self.pool.submit(job)
        self.queued.append((nbytes, future))
        return future


def plan_files(folders: Sequence[TensorFolder], world: World) -> dict[str, list[Shard]]:
    """Return the files of every folder, each assigned to the rank that has the fewest bytes to write so far.

    Of equal ranks those of different nodes come in turn, so that all nodes write at the same time.
    """
    # Every rank plans alike, from the sizes and the ranks alone: nothing has to be sent.
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    order = sorted(range(world.size), key=lambda rank: (rank % ranks_per_node, rank))  # the first of each node first
    files = {folder.folder: _cut_into_files(folder) for folder in folders}
    shards = list(chain.from_iterable(files.values()))
    sizes = [shard.nbytes for shard in shards]
    # In order, so that neighbouring files, which are of about the same size, go to different ranks.
    shares = balance(sizes, world.size, in_order=True)
    writers: dict[str, int] = {}
    for rank, share in zip(order, shares, strict=True):
        for index in share:
            path = shards[index].path
            writers[path] = rank
    shards_by_folder: dict[str, list[Shard]] = {}
    for name, folder_shards in files.items():
        assigned = []
        for shard in folder_shards:
            writer = writers[shard.path]
            assigned.append(replace(shard, writer=writer))
        shards_by_folder[name] = assigned
    return shards_by_folder


def _cut_into_files(folder: TensorFolder) -> list[Shard]:
    """Return the files of a folder, their writers not yet assigned."""
    names = list(folder.sizes)
    sizes = list(folder.sizes.values())
    if folder.adapter:  # PEFT and vLLM read one file
        return [Shard(f"{folder.folder}/{ADAPTER_WEIGHTS}", tuple(names), sum(sizes))]
    ends = cut(sizes)
    file_names = shard_names(len(ends))
    bounds = pairwise([0, *ends])
    shards = []
    for file_name, (start, stop) in zip(file_names, bounds, strict=True):
        shard = Shard(
            path=f"{folder.folder}/{file_name}",
            names=tuple(names[start:stop]),
            nbytes=sum(sizes[start:stop]),
        )
        shards.append(shard)
    return shards


def start_writing(
    save: PendingSave,
    folders: Sequence[TensorFolder],
    hf_assets: Path,
    dtype: torch.dtype,
    world: World,
    queue: DiskQueue,
    loop_arrays: Mapping[str, Tensor] | None = None,
) -> None:
    """Copy this rank's share of ``folders`` and queue it; when it returns, the model may change.  A collective.

    Args:
        save: gets the jobs.
        folders: what to write; those whose name has no ``-`` are models and get the ``hf_assets``.
        hf_assets: folder of configuration, tokenizer and processor, with a folder of a model's name where one has its
            own.
        dtype: dtype of the models' weights.
        world: this process.
        queue: writes.
        loop_arrays: this rank's part of the loop's state, by name.
    """
    files = plan_files(folders, world)
    if world.is_main:
        adapters = {folder.folder: folder.adapter for folder in folders if folder.adapter}
        prepared = queue.submit(0, lambda: _prepare(save.partial, files, adapters, hf_assets, dtype))
        save.jobs.append(prepared)
        prepared.exception()
    # No rank may write before the first one has made the folders.
    dist.barrier()
    for folder in folders:
        _queue_shards(save, folder, files[folder.folder], world, queue)
    states = [_copy(name, state) for name, state in generator_states().items()]
    states_job = _ShardJob(save.partial, generators_path(world.rank), states)
    future = queue.submit(0, states_job)
    save.jobs.append(future)
    if loop_arrays:
        nbytes = sum(array.nbytes for array in loop_arrays.values())
        queue.wait_for_room(nbytes)
        arrays = [_copy(name, array) for name, array in loop_arrays.items()]
        arrays_job = _ShardJob(save.partial, f"{LOOP}/{rank_file(world.rank)}", arrays)
        save.jobs.append(queue.submit(nbytes, arrays_job))


def generators_path(rank: int) -> str:
    """Return the file of a rank's random generators, relative to the checkpoint."""
    return f"{RNG}/{rank_file(rank)}"


def rank_file(rank: int) -> str:
    """Return the name of a file that a rank writes alone."""
    return f"rank_{rank:05d}.safetensors"


def is_loop_file(path: str) -> bool:
    """Return whether a file, relative to the checkpoint, has arrays of the loop's own state."""
    return path.startswith(f"{LOOP}/")


def _queue_shards(
    save: PendingSave,
    folder: TensorFolder,
    shards: Sequence[Shard],
    world: World,
    queue: DiskQueue,
) -> None:
    """Copy and queue this rank's shards of one folder.  A collective."""
    tensors = folder.tensors()
    for shard in shards:
        is_writer = shard.writer == world.rank
        if is_writer:
            queue.wait_for_room(shard.nbytes)
        copies = []
        # Every rank goes through all tensors, as each one is gathered by a collective.
        for expected in shard.names:
            name, tensor = next(tensors)
            assert name == expected, f"{name} comes where {expected} was planned"
            if is_writer:
                copies.append(_copy(name, tensor))
        watchdog.touch()
        if is_writer:
            shard_job = _ShardJob(save.partial, shard.path, copies)
            future = queue.submit(shard.nbytes, shard_job)
            save.jobs.append(future)
    # Also runs the collective to its end.
    assert next(tensors, None) is None, f"{folder.folder} has more tensors than planned"


def _copy(name: str, tensor: Tensor) -> Pending:
    """Copy a tensor to the host, so that training can go on while it is written."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    copy.copy_(tensor.detach())
    return Pending(name, copy.dtype, tuple(copy.shape), lambda: copy)


class _ShardJob:
    """Writes one shard, unless a value of it is not finite, and then drops its tensors."""

    def __init__(self, directory: Path, path: str, tensors: list[Pending]):
        self.directory = directory
        self.path = path
        self.tensors = tensors

    def __call__(self) -> Records:
        digest = hashlib.sha256()
        file = self.directory / self.path
        try:
            for tensor in self.tensors:
                # In the thread that writes, as it costs less than the hash.
                if tensor.dtype.is_floating_point and not _is_finite(tensor.load()):
                    raise NonFiniteError(f"{self.path}: {tensor.name} has values that are not finite")
            file.parent.mkdir(exist_ok=True)  # that of the loop's arrays is there only where a rank has some
            write_shard(file, self.tensors, digest)
        finally:
            # The future keeps an exception, whose traceback keeps this job: the copies must be freed all the same.
            self.tensors = []
        size = file.stat().st_size
        record = FileRecord(size, digest.hexdigest())
        return {self.path: record}


def _is_finite(tensor: Tensor) -> bool:
    # Piece by piece: the mask of a large tensor would be a copy that no limit counts.
    for piece in tensor.flatten().split(PIECE):
        if not torch.isfinite(piece).all():
            return False
    return True


def _prepare(
    partial: Path,
    files: dict[str, list[Shard]],
    adapters: dict[str, AdapterConfig],
    hf_assets: Path,
    dtype: torch.dtype,
) -> Records:
    """Make the folders and write the small files: HF assets, configurations of adapters, and indices."""
    shutil.rmtree(partial, ignore_errors=True)  # left over by a save that failed
    names: list[str] = []
    (partial / RNG).mkdir(parents=True)
    for folder, shards in files.items():
        path = partial / folder
        path.mkdir(parents=True)
        if "-" not in folder:
            # A critic of another size than the policy has files of its own.
            own_assets = hf_assets / folder
            copied = copy_hf_assets(own_assets if own_assets.is_dir() else hf_assets, path, dtype=dtype)
            if folder in adapters:
                write_adapter_config(path / ADAPTER_CONFIG, adapters[folder])
                copied.append(ADAPTER_CONFIG)
            names += [f"{folder}/{name}" for name in copied]
        if len(shards) > 1:
            tensors_by_file: dict[str, tuple[str, ...]] = {}
            total_bytes = 0
            for shard in shards:
                file_name = Path(shard.path).name
                tensors_by_file[file_name] = shard.names
                total_bytes += shard.nbytes
            write_index(path / INDEX, tensors_by_file, total_bytes)
            names.append(f"{folder}/{INDEX}")
    return {name: file_record(partial / name) for name in names}


def publish(save: PendingSave, records: Records) -> None:
    """Write the manifest over the files of all ranks and give the checkpoint its name; on one rank.

    The order makes it atomic: weights, indices and folders reach the disk before the manifest, and the manifest before
    the name.
    """
    for path in save.partial.rglob("*"):
        if path.is_dir():
            sync(path)
    write_manifest(save.partial, save.step, save.extra, records)
    sync(save.partial)
    _set_aside(save.final)
    save.partial.rename(save.final)
    sync(save.final.parent)  # a rename lasts once the folder above is on the disk


def _set_aside(folder: Path) -> None:
    """Rename a folder that has the name of a new checkpoint, and from which the run did not go on.

    It is damaged, of a newer format, or was put there by somebody, who may want it.
    """
    if folder.exists():
        free = folder.with_name(f"{folder.name}.unusable")
        for count in itertools.count(1):
            if not free.exists():
                break
            free = folder.with_name(f"{folder.name}.unusable{count}")
        folder.rename(free)
        logger.warning(f"{folder} could not be used and is now {free}; remove it by hand")


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, if it is there; it is renamed first, so that a kill leaves no half of it under its name."""
    if checkpoint.exists():
        doomed = checkpoint.with_name(f".{checkpoint.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        checkpoint.rename(doomed)
        shutil.rmtree(doomed)
