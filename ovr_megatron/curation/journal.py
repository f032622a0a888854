"""An append-only file of results that cost much, so that an interruption loses none: one JSON object a line.

Each has a ``key``, a 64-bit number.  The index is two columns of numbers, sorted; a line that an interruption cut off
is removed at the next opening, and a damaged one counts as not there.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ovr_megatron.runtime.json_lines import json_object
from ovr_megatron.runtime.terminal import say


class Journal:
    """Results in one file, found by key; the last one of a key counts.  A context manager."""

    def __init__(self, path: Path) -> None:
        """Open ``path``, or make it; half a line at its end is cut off, and damaged lines are named and left out."""
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._keys, self._places = array("Q"), array("q")
        end, damaged = 0, 0
        self._file.seek(0)
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            key = _key(line)
            if key is None:
                damaged += 1
            else:
                self._keys.append(key)
                self._places.append(end)
            end += len(line)
        self._file.truncate(end)
        if damaged:
            say(f"warning: {path}: {damaged} damaged lines, which count as not there")
        self._sort()

    def __enter__(self) -> Self:
        """Return the journal itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close the file."""
        self._file.close()

    def __len__(self) -> int:
        """Return the number of results at the last `reopen` or at the start."""
        return len(self._sorted)

    def __contains__(self, key: int) -> bool:
        """Whether there was a result of ``key`` at the last `reopen` or at the start."""
        return self._place(key) >= 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Every result in the order of the file."""
        self._file.flush()
        with self._path.open("rb") as file:
            yield from (json.loads(line) for line in file if _key(line) is not None)

    def __getitem__(self, key: int) -> dict[str, Any]:
        """The last result of ``key``; raises `KeyError` if there is none."""
        place = self._place(key)
        if place < 0:
            raise KeyError(key)
        self._file.seek(place)
        return json.loads(self._file.readline())

    def add(self, key: int, result: Mapping[str, Any]) -> None:
        """Append a result and hand it to the system; it is found after `reopen`."""
        self._keys.append(key)
        self._places.append(self._file.seek(0, 2))
        self._file.write(json.dumps({"key": key, **result}, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def reopen(self) -> None:
        """Make all that was added findable."""
        self._sort()

    def _sort(self) -> None:
        keys = np.frombuffer(self._keys, np.uint64) if self._keys else np.zeros(0, np.uint64)
        order = np.argsort(keys, kind="stable")
        self._sorted = keys[order]
        self._offsets = np.array(self._places, np.int64)[order]

    def _place(self, key: int) -> int:
        at = int(np.searchsorted(self._sorted, np.uint64(key), side="right")) - 1
        return int(self._offsets[at]) if at >= 0 and int(self._sorted[at]) == key else -1


def _key(line: bytes) -> int | None:
    """Return the key of a result, None for a line that is none."""
    key = (json_object(line) or {}).get("key")
    return key if isinstance(key, int) and not isinstance(key, bool) and 0 <= key < 1 << 64 else None
