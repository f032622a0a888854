"""Read and write Hugging Face folders of safetensors as a stream of tensors.

Reading maps the files into memory; `write_folder` holds a piece of a tensor, `WeightWriter` one shard, so that a
folder of any size passes through a small process.  Both generations of Hugging Face names are read; those of the
published checkpoints are written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ovr_megatron.data.hf_files import copy_files
from ovr_megatron.errors import UserError
from ovr_megatron.runtime.files import write_whole
from ovr_megatron.runtime.folder_kinds import describe_folder
from ovr_megatron.runtime.logs import NOTICE, get_logger
from ovr_megatron.runtime.progress import Progress
from ovr_megatron.weights import table
from ovr_megatron.weights.diagnosis import left_over
from ovr_megatron.weights.shard import Pending, sync, write_shard

logger = get_logger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
SHARD_BYTES = 1 << 30
_DTYPE_KEYS = {"dtype", "torch_dtype"}


class WeightError(UserError, ValueError):
    """Weights that are missing, damaged or of another model; names the file or the tensor, and the remedy."""


class _StoredTensor(NamedTuple):
    """An open safetensors file and the name that a tensor has there, of either generation."""

    shard: Any
    name: str


class WeightFolder:
    """The weights of a Hugging Face folder, by hub name, whatever their sharding and generation of names.

    Raises:
        WeightError: no weights, a missing or damaged shard, an index that disagrees with its shards.
    """

    def __init__(self, directory: str | Path, file: str = "") -> None:
        """Open ``directory``; of an adapter, ``file`` names the one file that it reads."""
        self.directory = Path(directory)
        self._stored: dict[str, _StoredTensor] = {}
        self._open_files = ExitStack()
        shards = {file: []} if file else _shards(self.directory)
        for file, expected in shards.items():
            path = self.directory / file
            shard = self._open(path)
            stored_names = list(shard.keys())
            absent = sorted(set(expected) - set(stored_names))
            if absent:
                absent_names = some(absent)
                raise WeightError(f"{path}: lacks {absent_names}, which {INDEX} says it holds; get both files again")
            for stored in stored_names:
                name = table.canonical(stored)
                # The two generations' names of one tensor are the same name here.
                if name in self._stored:
                    raise WeightError(f"{path}: {stored} is stored a second time; remove one of them")
                self._stored[name] = _StoredTensor(shard, stored)

    def _open(self, path: Path) -> Any:
        try:
            return self._open_files.enter_context(safe_open(path, framework="pt"))
        except FileNotFoundError:
            raise WeightError(f"{path} is missing, but {INDEX} names it; download or copy this shard again") from None
        except (SafetensorError, OSError) as error:
            raise WeightError(f"{path} is damaged or cut off ({error}); download or copy this file again") from error

    def __enter__(self) -> WeightFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open_files.close()

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def names(self) -> list[str]:
        """Return the Hugging Face names of all tensors, in the order of the files."""
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        tensor_slice = self._slice(name)
        return tuple(tensor_slice.get_shape())

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor as safetensors writes it (``F32``, ``BF16``), without reading it."""
        return self._slice(name).get_dtype()

    def tensor(self, name: str) -> Tensor:
        """Return the tensor, mapped from its file: pages are read when they are used.  Do not write to it."""
        stored = self._find(name)
        return stored.shard.get_tensor(stored.name)

    def _slice(self, name: str) -> Any:
        stored = self._find(name)
        return stored.shard.get_slice(stored.name)

    def _find(self, name: str) -> _StoredTensor:
        if name not in self._stored:
            raise WeightError(f"{self.directory} has no tensor {name}; it is of another model or not whole")
        return self._stored[name]


def _shards(directory: Path) -> dict[str, list[str]]:
    """Return the files of a folder, with the names that the index expects in each."""
    index = directory / INDEX
    if index.exists():
        return _indexed_shards(index)
    files = _model_files(directory)
    if files == [SINGLE]:
        return {SINGLE: []}
    if files:
        present = some(files)
        raise WeightError(f"{directory} has {present} but no {INDEX}; get the index, or the whole folder, again")
    problem = f"{directory} has no safetensors weights; give the folder of a Hugging Face model in safetensors"
    raise WeightError(describe_folder(directory, "model") or problem)


def _indexed_shards(index: Path) -> dict[str, list[str]]:
    """Return the files that an index names, with the names of the tensors in each."""
    try:
        content = json.loads(index.read_text())
        weight_map: dict[str, str] = content["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise WeightError(f"{index} is not a safetensors index ({error!r}); get this file again") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightError(f"{index} names no tensor; get this file again")
    shards: dict[str, list[str]] = {}
    # An index may come from elsewhere: it must not make the reader open files outside the folder.
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise WeightError(f"{index}: {name} points outside the folder, to {file!r}")
        shards.setdefault(file, []).append(name)
    return shards


def _model_files(directory: Path) -> list[str]:
    """Return the safetensors files of a folder without those known to be no part of the model, and print these."""
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    # Only beside a whole model are the others known to be no part of it.
    if SINGLE not in names:
        return [name for name in names if name != ADAPTER_WEIGHTS]
    model_names = []
    for name in names:
        kind = left_over(name)
        if kind:
            path = directory / name
            logger.log(NOTICE, f"notice: {path} is {kind}; {SINGLE} is read")
        else:
            model_names.append(name)
    return model_names


def copy_hf_assets(source: Path, out: Path, dtype: torch.dtype | None = None) -> list[str]:
    """Copy the known files beside the weights: config, tokenizer, processor, chat template, generation config.

    With ``dtype``, ``config.json`` names it as the dtype of the weights.

    Returns:
        The names of the copied files, relative to the folder.

    Raises:
        AssetError: one of them is a link that leaves the folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    copied = copy_files(source, out)
    if dtype is not None:
        path = out / "config.json"
        config = json.loads(path.read_text())
        dtype_name = str(dtype).removeprefix("torch.")
        new_config = _with_dtype(config, dtype_name)
        # A config that names the dtype already stays as it was written, byte for byte.
        if new_config != config:
            text = json.dumps(new_config, indent=2, ensure_ascii=False)
            path.write_text(text + "\n")
    return copied


def _with_dtype(config: Mapping[str, object], dtype: str) -> dict[str, object]:
    """Return the config with ``dtype`` as its dtype, which Transformers 4 calls torch_dtype and 5 dtype."""
    new_config = _replaced(config, dtype)
    if not new_config.keys() & _DTYPE_KEYS:
        new_config["torch_dtype"] = dtype  # the key that both versions read
    return new_config


def _replaced(config: Mapping[str, object], dtype: str) -> dict[str, object]:
    """Return the config with ``dtype`` wherever it names one, also in the configs of its parts."""
    new_config: dict[str, object] = {}
    for key, value in config.items():
        if key in _DTYPE_KEYS:
            new_config[key] = dtype
        elif isinstance(value, dict):
            new_config[key] = _replaced(value, dtype)
        else:
            new_config[key] = value
    return new_config


class WeightWriter:
    """Writes tensors to safetensors shards of about ``shard_bytes``, and the index if there is more than one.

    Use it in a ``with`` block.  The shards carry temporary names until the block ends; an interrupted write leaves
    nothing that looks like a model.

    Raises:
        WeightError: the folder has weights already, or a tensor comes twice.
    """

    def __init__(self, directory: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.directory = Path(directory)
        self.shard_bytes = shard_bytes
        self._pending: list[Pending] = []  # tensors of the next shard
        self._shards: list[list[str]] = []
        self._names: set[str] = set()
        self._total_bytes = 0
        _prepare(self.directory)

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor under its Hugging Face name.  It is held, and must not change, until its shard is full."""
        if name in self._names:
            raise WeightError(f"{self.directory}: {name} is written twice")
        tensor = tensor.detach().cpu().contiguous()
        pending_bytes = sum(pending.nbytes for pending in self._pending)
        total_bytes = pending_bytes + tensor.nbytes
        # A tensor larger than a shard gets one of its own.
        if self._pending and total_bytes > self.shard_bytes:
            self._flush()
        pending = Pending(
            name=name,
            dtype=tensor.dtype,
            shape=tuple(tensor.shape),
            load=lambda: tensor,
        )
        self._pending.append(pending)
        self._names.add(name)
        self._total_bytes += tensor.nbytes

    def _flush(self) -> None:
        names = [pending.name for pending in self._pending]
        self._shards.append(names)
        # How many shards there will be, which is a part of their names, is not known before the end.
        path = _partial(self.directory, len(self._shards))
        write_shard(path, self._pending)
        self._pending = []

    def __enter__(self) -> WeightWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self._flush()
                _publish(self.directory, self._shards, self._total_bytes)
        finally:
            _discard(self.directory)


def write_folder(
    directory: Path,
    tensors: Sequence[Pending],
    what: str,
    workers: int = 1,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the files that a `WeightWriter` writes of the same tensors, ``workers`` shards at a time, piece by piece.

    Raises:
        WeightError: the folder has weights already, or a tensor comes twice.
    """
    distinct_names = {tensor.name for tensor in tensors}
    if len(distinct_names) < len(tensors):
        raise WeightError(f"{directory}: a tensor is written twice")
    sizes = [tensor.nbytes for tensor in tensors]
    bounds = [0, *cut(sizes, shard_bytes)]
    shards: list[list[Pending]] = []
    paths: list[Path] = []
    names: list[list[str]] = []
    for start, stop in pairwise(bounds):
        shard = list(tensors[start:stop])
        shard_tensor_names = [tensor.name for tensor in shard]
        shards.append(shard)
        names.append(shard_tensor_names)
        path = _partial(directory, len(shards))
        paths.append(path)
    _prepare(directory)
    try:
        with ThreadPoolExecutor(workers) as pool, Progress(len(tensors), what, "tensor") as progress:
            # The results are asked for, as they raise a thread's error: no shard that failed may be published.
            for shard, _ in zip(shards, pool.map(write_shard, paths, shards), strict=True):
                progress.update(len(shard))
        _publish(directory, names, sum(sizes))
    finally:
        _discard(directory)


def _partial(directory: Path, shard_index: int) -> Path:
    """Return the temporary path of a shard; ``shard_index`` counts from 1."""
    return directory / f"model-{shard_index:05d}.partial"


def _prepare(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    has_weights = any(directory.glob("*.safetensors"))
    if has_weights or (directory / INDEX).exists():
        raise WeightError(f"{directory} has weights already; remove them or choose another folder")
    _discard(directory)


def _discard(directory: Path) -> None:
    """Remove the shards that have no name yet: of a write that failed, or of one that was killed."""
    for unfinished in directory.glob("model*.partial"):
        unfinished.unlink()


def _publish(directory: Path, shards: Sequence[Sequence[str]], total_bytes: int) -> None:
    """Rename the shards to their names, the index last: a folder without it is not read as several shards."""
    names = shard_names(len(shards))
    for shard_index, name in enumerate(names, start=1):
        partial = _partial(directory, shard_index)
        partial.rename(directory / name)
    if len(shards) > 1:
        tensors_by_file = dict(zip(names, shards, strict=True))
        write_index(directory / INDEX, tensors_by_file, total_bytes)
    # The data of every shard is on the disk; this adds the new names.
    sync(directory)


def cut(sizes: Sequence[int], shard_bytes: int = SHARD_BYTES) -> list[int]:
    """Return the ends of shards of at most ``shard_bytes`` that take tensors of ``sizes`` (bytes) in order."""
    ends: list[int] = []
    current_bytes = 0
    for index, size in enumerate(sizes):
        # A tensor larger than a shard gets one of its own.
        if current_bytes and current_bytes + size > shard_bytes:
            ends.append(index)
            current_bytes = 0
        current_bytes += size
    return [*ends, len(sizes)]


def shard_names(count: int) -> list[str]:
    """Return Hugging Face's names of ``count`` shards."""
    if count <= 1:
        return [SINGLE]
    indices = range(1, count + 1)
    return [f"model-{index:05d}-of-{count:05d}.safetensors" for index in indices]


def write_index(path: Path, shards: Mapping[str, Sequence[str]], total_bytes: int) -> None:
    """Write Hugging Face's index of ``shards``, the tensors of each file, and wait until the disk has it."""
    weight_map: dict[str, str] = {}
    for file, tensors in shards.items():
        weight_map |= dict.fromkeys(tensors, file)
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": weight_map,
    }
    text = json.dumps(index, indent=2)
    write_whole(path, text + "\n", durable=True)


def some(names: list[str]) -> str:
    """Return the first names of a list that may be long, and how many more there are."""
    first_names = ", ".join(names[:3])
    further = len(names) - 3
    if further <= 0:
        return first_names
    return f"{first_names} and {further} more"
