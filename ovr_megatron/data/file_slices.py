"""Parts of files, such as the members of a tar file: named by offset and size, read when they are needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO


@dataclass(frozen=True)
class FileSlice:
    """``size`` bytes from ``offset`` of the file at ``path``; ``name`` is that of the member, for errors."""

    path: str
    offset: int
    size: int
    name: str


def open_file(path: str) -> IO[bytes]:
    """Open the file at ``path`` for reading."""
    return open(path, "rb")


def read_slice(part: FileSlice) -> bytes:
    """Return the bytes of a part of a file.

    Raises:
        OSError: the file cannot be read, or ends before the part does.
    """
    # Opened for each part: thousands of shards would be more open files than a process may have.
    with open_file(part.path) as file:
        file.seek(part.offset)
        data = file.read(part.size)
    if len(data) != part.size:
        raise OSError(f"{part.path} ends inside of {part.name!r}")
    return data
