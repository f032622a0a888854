"""One job on a run folder at a time: a lock that the kernel releases when its holder ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
import time
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

from ovr_megatron.errors import UserError

# A file server keeps the lock of a node that died until its lease runs out, on NFS 4 after 90 s.
LEASE_S = 100.0
_NOT_SUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunLockedError(UserError, RuntimeError):
    """Another job works on the run folder; names its host and process."""


class RunLock:
    """Holds ``RUN/.lock`` on the first rank until the process ends.  A collective.

    The lock belongs to the process: children do not inherit it, so that none of them outlives it with the lock.

    Raises:
        RunLockedError: on every rank, if another process holds it; one on another host is waited for, as it may be
            one that died with its node.
    """

    def __init__(self, run: Path, is_main: bool):
        self.file: IO[str] | None = None
        answer: list[Any] = [None]
        if is_main:
            run.mkdir(parents=True, exist_ok=True)
            answer = [self._take(run / ".lock")]
        dist.broadcast_object_list(answer, src=0)
        if answer[0]:
            raise RunLockedError(f"{run} is in use by {answer[0]}; wait for it, stop it, or choose another run.dir")

    def _take(self, path: Path) -> str | None:
        """Take the lock; the holder if it cannot be had."""
        file = path.open("a+")
        until = time.monotonic() + LEASE_S
        while not _locked(file):
            file.seek(0)
            holder = file.read().strip() or "another process"
            if _is_here(holder) or time.monotonic() > until:
                file.close()
                return holder
            print(f"{path}: held by {holder}; waiting, as it may have died with its node", file=sys.stderr, flush=True)
            time.sleep(5.0)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        self.file = file  # closing it, or any other descriptor of the file, gives the lock away
        return None


def _is_here(holder: str) -> bool:
    return f" on {socket.gethostname()} " in holder


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno in _NOT_SUPPORTED:
            print(f"warning: {file.name}: this file system has no locks; start one job only", file=sys.stderr)
            return True
        raise
    return True
