"""Files to which whole records are appended while a run goes on, also over a disk that is full for a while."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from pathlib import Path
from typing import BinaryIO

from ovr_megatron.runtime.terminal import say

WAITING_BYTES = 1 << 26


class AppendedFile:
    """Appends whole records to ``path``.

    A record that cannot be written waits in memory, with those after it, until a later one finds room; of more than
    `WAITING_BYTES` the oldest are lost.  Never does half a record stay in the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.file: BinaryIO | None = None
        self.size = 0
        self.waiting: deque[bytes] = deque()
        self.lost = 0
        self.problem: str | None = None
        self._write_waiting()

    def append(self, record: bytes) -> None:
        """Write what waits and ``record``, or have it wait."""
        self.waiting.append(record)
        while len(self.waiting) > 1 and sum(map(len, self.waiting)) > WAITING_BYTES:
            self.waiting.popleft()
            self.lost += 1
        self._write_waiting()

    def close(self) -> None:
        """Try once more to write what waits, say what is lost, and close the file."""
        self._write_waiting()
        if self.waiting:
            say(f"warning: {self.path}: {len(self.waiting) + self.lost} records are lost: {self.problem}")
        if self.file is not None:
            self.file.close()

    def _write_waiting(self) -> None:
        try:
            if self.file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.file = self.path.open("ab", buffering=0)  # what is written is the system's at once
                self.size = self.file.seek(0, os.SEEK_END)
            while self.waiting:
                self._write(self.file, self.waiting[0])
                self.waiting.popleft()
        except OSError as error:
            if self.problem is None:
                say(
                    f"warning: {self.path} cannot be written ({error.strerror}); records wait in memory and training "
                    "goes on; make room"
                )
            self.problem = error.strerror or str(error)
            return
        if self.problem is not None:
            say(f"{self.path}: written again, {f'{self.lost} records are lost' if self.lost else 'nothing is missing'}")
        self.problem, self.lost = None, 0

    def _write(self, file: BinaryIO, record: bytes) -> None:
        rest = memoryview(record)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            # A full disk takes what still fits; a file can be cut there without room.
            with contextlib.suppress(OSError):
                os.ftruncate(file.fileno(), self.size)
            raise
        self.size += len(record)
