"""Append complete records to files during a run, also while the disk is full for some time."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from pathlib import Path
from typing import BinaryIO

from ovr_megatron.runtime.logs import NOTICE, get_logger

logger = get_logger(__name__)

WAITING_BYTES = 1 << 26


class AppendedFile:
    """Appends complete records to ``path``.

    A record that cannot be written waits in memory, with those after it, until a later call can write them. Of more
    than `WAITING_BYTES` the oldest are lost. The file never keeps a part of a record.
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
        """Write the waiting records and ``record``, or let it wait."""
        self.waiting.append(record)
        while len(self.waiting) > 1 and sum(map(len, self.waiting)) > WAITING_BYTES:
            self.waiting.popleft()
            self.lost += 1
        self._write_waiting()

    def close(self) -> None:
        """Try once more to write the waiting records, report the lost ones, and close the file."""
        self._write_waiting()
        if self.waiting:
            logger.warning(f"{self.path}: {len(self.waiting) + self.lost} records are lost: {self.problem}")
        if self.file is not None:
            self.file.close()

    def _write_waiting(self) -> None:
        try:
            if self.file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.file = self.path.open("ab", buffering=0)  # a kill of the process loses nothing that was written
                self.size = self.file.seek(0, os.SEEK_END)
            while self.waiting:
                self._write(self.file, self.waiting[0])
                self.waiting.popleft()
        except OSError as error:
            if self.problem is None:
                logger.warning(
                    f"{self.path} cannot be written ({error.strerror}); records wait in memory and training "
                    "goes on; make room"
                )
            self.problem = error.strerror or str(error)
            return
        if self.problem is not None:
            losses = f"{self.lost} records are lost" if self.lost else "nothing is missing"
            logger.log(NOTICE, f"{self.path}: written again, {losses}")
        self.problem = None
        self.lost = 0

    def _write(self, file: BinaryIO, record: bytes) -> None:
        rest = memoryview(record)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            # A full disk takes the part that still fits; to truncate a file needs no room.
            with contextlib.suppress(OSError):
                os.ftruncate(file.fileno(), self.size)
            raise
        self.size += len(record)
