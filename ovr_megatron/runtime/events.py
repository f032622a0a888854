"""Write TensorBoard events record by record, as TensorBoard's own writer does, without its thread.

That thread ends at the first full disk, and half a record hides all that come after it.
"""

from __future__ import annotations

import io
import itertools
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar

from ovr_megatron.runtime.appended import AppendedFile

_VERSION = "brain.Event:2"
_files = itertools.count()


class EventFile:
    """One event file in ``folder``; TensorBoard drops the events that earlier files have from ``purge_step`` on."""

    def __init__(self, folder: Path, purge_step: int | None = None):
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_files)}"
        self.file = AppendedFile(folder / name)
        self._append(Event(wall_time=time.time(), file_version=_VERSION))
        if purge_step is not None:
            begin = SessionLog(status=SessionLog.START)
            self._append(Event(wall_time=time.time(), step=purge_step, session_log=begin))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Append ``values`` under ``step``."""
        for name, value in values.items():
            self.summary(step, scalar(name, value))

    def summary(self, step: int, summary: Summary) -> None:
        """Append a summary that `torch.utils.tensorboard.summary` has made."""
        self._append(Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def _append(self, event: Event) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self.file.append(record.getvalue())
