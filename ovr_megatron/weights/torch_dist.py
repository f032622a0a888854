"""Read and write Megatron-Core's ``torch_dist`` checkpoints: tensors in chunks, and an index of where they lie.

A folder has ``metadata.json`` (names the format), ``.metadata`` (the index, a pickle), ``*.distcp`` (the chunks, each
as `torch.save` writes it) and ``common.pt`` (arguments of the run, which are not read).  The index is read by an
unpickler that knows the records of `torch.distributed.checkpoint` and calls nothing else; chunks by
``weights_only=True``.
"""

from __future__ import annotations

import io
import json
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import metadata as records
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from ovr_megatron.runtime.files import write_whole
from ovr_megatron.weights.folder import WeightError
from ovr_megatron.weights.shard import FORMATS, sync

INDEX = ".metadata"
FORMAT_FILE = "metadata.json"
COMMON = "common.pt"
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_PLAIN = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.", "pathlib")
_AGAIN = "copy the checkpoint again"


class PlainRecord:
    """Attributes of a pickled object and nothing of its class: its constructor takes anything and does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> PlainRecord:
        """Return an empty record, whatever the pickle passes."""
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Take whatever the pickle passes, and drop it."""

    def __setstate__(self, state: object) -> None:
        """Keep the attributes, where the state is a dictionary of them."""
        if isinstance(state, dict):
            self.__dict__.update(state)


def _known_globals() -> dict[str, Any]:
    """Return the classes that an index may name; the storage's record and those of old versions by what they hold."""
    classes = (
        Metadata,
        MetadataIndex,
        TensorStorageMetadata,
        ChunkStorageMetadata,
        TensorProperties,
        records.BytesStorageMetadata,
        records.StorageMeta,
        records._MEM_FORMAT_ENCODING,
        torch.Size,
    )
    known: dict[str, Any] = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in classes}
    known["torch.distributed.checkpoint.filesystem._StorageInfo"] = PlainRecord
    # Returns the layout of a name, from a table.
    known["torch.serialization._get_layout"] = torch.serialization._get_layout
    old = "torch.distributed._shard.sharded_tensor.metadata"
    known[f"{old}.TensorProperties"] = TensorProperties
    known[f"{old}.MEM_FORMAT_ENCODING"] = records._MEM_FORMAT_ENCODING
    for dtype in (*FORMATS.values(), torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2):
        known[str(dtype)] = dtype
    return known


class IndexUnpickler(pickle.Unpickler):
    """Unpickle the index of a checkpoint: its own records, plain records for a writer's plans, nothing else."""

    known = _known_globals()

    def find_class(self, module: str, name: str) -> Any:
        """Return the class of a record.

        Raises:
            UnpicklingError: the pickle names anything else.
        """
        if known := self.known.get(f"{module}.{name}"):
            return known
        # Plans of the writer, and the path that it wrote to.
        if module.startswith(_PLAIN):
            return PlainRecord
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_index(directory: Path) -> Metadata:
    """Return the index of a checkpoint.

    Raises:
        WeightError: it is missing, damaged, or names what is no record of a checkpoint.
    """
    path = directory / INDEX
    try:
        with path.open("rb") as file:
            index = IndexUnpickler(file).load()
    except FileNotFoundError:
        raise WeightError(f"{path} is missing: no whole torch_dist checkpoint; {_AGAIN}") from None
    # A damaged pickle raises nearly every class of error.
    except Exception as error:
        raise WeightError(
            f"{path} is not the index of a torch_dist checkpoint ({error or type(error).__name__}); nothing of it was "
            f"run; {_AGAIN}"
        ) from error
    entries = getattr(index, "state_dict_metadata", None)
    storage = getattr(index, "storage_data", None)
    if not isinstance(entries, dict) or not isinstance(storage, dict):
        raise WeightError(f"{path} is not the index of a torch_dist checkpoint; {_AGAIN}")
    return Metadata(entries, storage_data=storage)


class TorchDistFolder:
    """The tensors of a torch_dist checkpoint, by their stored names; one chunk at a time is in memory.

    Attributes:
        directory: of the iteration.
        sizes: of each stored tensor, as stored: layers may be stacked along a first dimension.

    Raises:
        WeightError: another format, or no index.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        _check_format(directory)
        index = read_index(directory)
        self._entries: dict[str, TensorStorageMetadata] = {}
        for key, entry in index.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                self._entries[key] = entry
        self._storage = index.storage_data
        self.sizes: dict[str, tuple[int, ...]] = {}
        for key, tensor_entry in self._entries.items():
            self.sizes[key] = tuple(tensor_entry.size)

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of a stored tensor."""
        return self._entries[key].properties.dtype

    def shards(self, key: str, layer: int | None = None) -> list[Tensor]:
        """Return a list of one tensor: the whole of ``key``, or of a stacked one the part of ``layer``.

        Raises:
            WeightError: a chunk is missing or damaged.
        """
        entry = self._entries[key]
        size = tuple(entry.size)
        first = 0 if layer is None else layer
        count = size[0] if layer is None and size else 1
        target = torch.empty((count, *size[1:]) if size else (), dtype=entry.properties.dtype)
        covered = 0
        for chunk in entry.chunks:
            covered += self._copy(key, chunk, target, first, count)
        if covered != target.numel():
            raise WeightError(f"{self.directory}: chunks of {key} hold {covered} of {target.numel()} values; {_AGAIN}")
        return [target if layer is None else target[0]]

    def _copy(self, key: str, chunk: ChunkStorageMetadata, target: Tensor, first: int, count: int) -> int:
        """Copy the part of ``chunk`` in the rows [first, first + count) to ``target``; return its elements."""
        if not chunk.sizes:
            target.copy_(self._load(key, chunk))
            return 1
        start = max(chunk.offsets[0], first)
        stop = min(chunk.offsets[0] + chunk.sizes[0], first + count)
        if start >= stop:
            return 0
        row_count = stop - start
        part = self._load(key, chunk).narrow(0, start - chunk.offsets[0], row_count)
        region = target.narrow(0, start - first, row_count)
        for dim in range(1, target.dim()):
            region = region.narrow(dim, chunk.offsets[dim], chunk.sizes[dim])
        region.copy_(part)
        return part.numel()

    def _load(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        """Read a chunk from its file."""
        stored = self._storage.get(MetadataIndex(key, chunk.offsets))
        name = str(getattr(stored, "relative_path", ""))
        # An index may come from elsewhere: it must not make the reader open files outside the folder.
        if Path(name).name != name or not name:
            raise WeightError(f"{self.directory / INDEX}: {key} lies in {name!r}, which is no file of the folder")
        if getattr(stored, "transform_descriptors", None):
            raise WeightError(f"{self.directory}: {key} is stored compressed, which is not read; save it without")
        path = self.directory / name
        try:
            with path.open("rb") as file:
                file.seek(stored.offset)
                data = io.BytesIO(file.read(stored.length))
            tensor = torch.load(data, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise WeightError(f"{path} is missing, but {INDEX} names it; {_AGAIN}") from None
        # `torch.load` raises nearly every class of error for damaged bytes.
        except Exception as error:
            raise WeightError(f"{path}: {key} is damaged or cut off ({type(error).__name__}); {_AGAIN}") from error
        if not isinstance(tensor, Tensor) or tensor.shape != chunk.sizes:
            raise WeightError(f"{path}: {key} is not of the shape that {INDEX} says; {_AGAIN}")
        return tensor.detach()


def _check_format(directory: Path) -> None:
    """Refuse a folder whose ``metadata.json`` names another format, or that has none.

    Raises:
        WeightError: names the format and the remedy.
    """
    path = directory / FORMAT_FILE
    try:
        backend = json.loads(path.read_text())["sharded_backend"]
    except FileNotFoundError:
        raise WeightError(f"{path} is missing: no torch_dist checkpoint of Megatron-Core; give one") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise WeightError(f"{path} cannot be read ({error!r}); {_AGAIN}") from error
    if backend != _FORMAT["sharded_backend"]:
        raise WeightError(
            f"{path}: the format is {backend!r}, and torch_dist alone is read; load it with the Megatron that wrote it "
            "and save it as torch_dist"
        )


@dataclass(frozen=True)
class TensorChunk:
    """A part of a tensor that is to be written: ``load`` gives it when its turn comes.

    Attributes:
        key: name of the whole tensor.
        size: of the whole tensor.
        offsets: where this part begins.
        sizes: of this part.
        dtype: of the tensor.
        load: returns the part, in any shape with its elements in order.
    """

    key: str
    size: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]


class _StreamPlanner(dcp.DefaultSavePlanner):
    """Plans the chunks of one process, and loads each of them only when the writer asks for its data."""

    def __init__(self, chunks: Sequence[TensorChunk], objects: Sequence[str]):
        super().__init__(flatten_state_dict=False)
        self._chunks = {MetadataIndex(chunk.key, chunk.offsets): chunk for chunk in chunks}
        self._objects = objects

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._objects]
        for index, chunk in self._chunks.items():
            stored = ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
            data = TensorWriteData(stored, TensorProperties(dtype=chunk.dtype), torch.Size(chunk.size))
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            data = io.BytesIO()
            torch.save([None], data)
            return data
        chunk = self._chunks[write_item.index]
        return chunk.load().to(chunk.dtype).reshape(chunk.sizes)


def write_torch_dist(
    directory: Path,
    chunks: Sequence[TensorChunk],
    objects: Sequence[str],
    common: Mapping[str, object],
) -> None:
    """Write a torch_dist checkpoint, one chunk in memory at a time.

    Args:
        directory: of the iteration; it exists.
        chunks: that fill their tensors.
        objects: names of states that are stored empty, as a module without a state of its own stores them.
        common: what every rank reads, of plain Python values.
    """
    writer = dcp.FileSystemWriter(directory, thread_count=1)
    with warnings.catch_warnings():
        # It says that there is a single process, which `no_dist` has said.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        dcp.save({}, storage_writer=writer, planner=_StreamPlanner(chunks, objects), no_dist=True)
    torch.save(dict(common), directory / COMMON)
    write_whole(directory / FORMAT_FILE, json.dumps(_FORMAT), durable=True)
    sync(directory)
