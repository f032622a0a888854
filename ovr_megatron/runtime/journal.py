"""An append-only file of expensive results, so that an interruption loses none: one JSON object a line.

Each result has a ``key``, a 64-bit integer.  The index is two sorted columns of integers.  A line that an interruption
cut off is removed when the file is next opened; a damaged line counts as missing.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ovr_megatron.runtime.json_lines import json_lines
from ovr_megatron.runtime.logs import get_logger

logger = get_logger(__name__)


class Journal:
    """Results in one file by key; the last result of a key counts.  A context manager.

    Attributes:
        path: The file.
    """

    def __init__(self, path: Path, append: bool = True) -> None:
        """Open or create ``path``; cut off an incomplete line at its end, and skip damaged lines with a warning.

        Without ``append`` the file, which must exist, is read alone and stays as it is: another process may write it.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b" if append else "rb")
        self._keys = array("Q")
        self._offsets = array("q")  # bytes from the start of the file, of the line of each key
        end = 0
        damaged = 0
        for line in json_lines(path):
            if not line.is_complete:  # an interruption cut the last write off
                break
            key = _key(line.parse_or_none())
            if key is None:
                damaged += 1
            else:
                self._keys.append(key)
                self._offsets.append(line.offset)
            end = line.offset + len(line.content)
        # Otherwise the next result would be appended to half a line, and both would be lost.
        if append:
            self._file.truncate(end)
        if damaged:
            logger.warning(f"{path}: {damaged} damaged lines, which count as not there")
        self._sort()

    def __enter__(self) -> Self:
        """Return the journal itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._file.close()

    def __len__(self) -> int:
        """Return the number of results at the last `reopen` or at the start."""
        return len(self._sorted_keys)

    def __contains__(self, key: int) -> bool:
        """Return whether there was a result of ``key`` at the last `reopen` or at the start."""
        return self._offset(key) >= 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield every result in the order of the file."""
        # A second file object: it sees only flushed results, and does not move the position of the first.
        if self._file.writable():
            self._file.flush()
        for line in json_lines(self.path):
            result = line.parse_or_none()
            if result is not None and _key(result) is not None:
                yield result

    def __getitem__(self, key: int) -> dict[str, Any]:
        """Return the last result of ``key``; raises `KeyError` if there is none."""
        offset = self._offset(key)
        if offset < 0:
            raise KeyError(key)
        self._file.seek(offset)
        return json.loads(self._file.readline())

    def add(self, key: int, result: Mapping[str, object]) -> None:
        """Append a result and flush it to the operating system; lookups see it after `reopen`."""
        line = json.dumps({"key": key, **result}, ensure_ascii=False)
        self._keys.append(key)
        # To the end: a lookup may have moved the position.
        self._offsets.append(self._file.seek(0, 2))
        self._file.write(line.encode() + b"\n")
        # What the system has survives the end of this process; a crash of the machine may lose it.
        self._file.flush()

    def reopen(self) -> None:
        """Make all added results visible to lookups."""
        self._sort()

    def _sort(self) -> None:
        keys = np.array(self._keys, np.uint64)
        offsets = np.array(self._offsets, np.int64)
        order = np.argsort(keys, kind="stable")  # stable: the last result of a key is the last of its run
        self._sorted_keys = keys[order]
        self._sorted_offsets = offsets[order]

    def _offset(self, key: int) -> int:
        """Return the offset of the last result of ``key``, or -1."""
        end = np.searchsorted(self._sorted_keys, np.uint64(key), side="right")
        index = int(end) - 1
        if index < 0:
            return -1
        # The last key that is not above `key`, which need not be `key` itself.
        nearest_key = int(self._sorted_keys[index])
        if nearest_key != key:
            return -1
        return int(self._sorted_offsets[index])


def _key(result: Mapping[str, object] | None) -> int | None:
    """Return the key of a result, None for an object that is no result."""
    if result is None:
        return None
    key = result.get("key")
    if not isinstance(key, int) or isinstance(key, bool):
        return None
    # A damaged line may hold a number that the column of 64 bits would not take.
    return key if 0 <= key < 1 << 64 else None
