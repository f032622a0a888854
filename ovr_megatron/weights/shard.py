"""One safetensors file, written piece by piece: memory holds a piece of a tensor, whatever the tensor's size."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

PIECE = 1 << 22  # numbers that pass through memory at once
# By the name that safetensors gives them, in the order in which it lays them out: wide formats stay aligned.
FORMATS = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_ORDER = {dtype: (index, name) for index, (name, dtype) in enumerate(FORMATS.items())}


@dataclass(frozen=True)
class Pending:
    """A tensor that is to be written in ``dtype``; ``load`` gives it, mapped or in memory, in any format."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        numel = math.prod(self.shape)
        return numel * self.dtype.itemsize


class TensorEntry(TypedDict):
    """A tensor in the header of a safetensors file; ``data_offsets`` are its first byte and the one after its last."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


def write_shard(path: Path, tensors: Sequence[Pending], digest: Any = None) -> None:
    """Write a safetensors file and wait until the disk has it; the same bytes as the library's ``save_file``.

    ``digest``, a hash of `hashlib`, sees every byte on its way.
    """
    ordered = sorted(tensors, key=lambda tensor: (_ORDER[tensor.dtype], tensor.name))
    try:
        with path.open("wb") as file:
            for data in _content(ordered):
                file.write(data)
                if digest is not None:
                    digest.update(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk does not say which file


def _content(ordered: Sequence[Pending]) -> Iterator[Any]:
    """The bytes of the file, piece by piece."""
    yield _header(ordered)
    for tensor in ordered:
        flat = tensor.load().flatten()
        for piece in flat.split(PIECE):
            # A cast of the whole tensor would be a second copy of it.
            data = as_bytes(piece.to(tensor.dtype))
            yield data.numpy()


def _header(tensors: Sequence[Pending]) -> bytes:
    """Length and text of the header, padded so that the numbers begin at a multiple of eight."""
    entries: dict[str, TensorEntry | dict[str, str]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin = end
        end = begin + tensor.nbytes
        entries[tensor.name] = {
            "dtype": _ORDER[tensor.dtype][1],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    # Readers map the file and view the numbers in their dtype, of up to eight bytes, without a copy.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, uint8; a view where it is contiguous."""
    return tensor.contiguous().flatten().view(torch.uint8)


def sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
