"""Write files atomically: a reader sees the old content or the new one, never a part."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def atomic_file(path: Path, durable: bool = False) -> Iterator[BinaryIO]:
    """Open a file that becomes ``path`` at the end of the block; after an error ``path`` is as it was.

    Args:
        path: the file; its folder must be there.
        durable: whether the disk has the content before the file gets its name.  Otherwise a crash of the machine,
            though none of the process, may leave an empty file.
    """
    # In the same folder and so on the same file system: the rename replaces the file in one step.
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to report
            partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: str | bytes, durable: bool = False) -> Path:
    """Write ``content``, a text as UTF-8, to ``path`` and return it; see `atomic_file`."""
    with atomic_file(path, durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return path


def write_json(path: Path, value: Any, indent: int = 2, ensure_ascii: bool = True) -> Path:
    """Write ``value`` to ``path`` as JSON and return it; ``indent`` and ``ensure_ascii`` are those of `json.dumps`."""
    return write_whole(path, json.dumps(value, indent=indent, ensure_ascii=ensure_ascii) + "\n")
