"""Lock a folder for one job, with a lock that the kernel releases when its holder ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

from ovr_megatron.errors import UserError
from ovr_megatron.runtime.kernel_lock import try_lock
from ovr_megatron.runtime.logs import NOTICE, get_logger

logger = get_logger(__name__)

# A file server keeps the lock of a node that died until its lease runs out, on NFS 4 after 90 s.
LEASE_S = 100.0
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
# The path itself cannot be used. Anything else may pass, such as a fault of the file server or a full disk.
_PATH_ERRORS = (*_READ_ONLY, errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


class RunLockedError(UserError, RuntimeError):
    """Another job works on the folder; names its host and process."""


class RunFolderError(UserError):
    """The folder cannot be made or written to; names it and the reason."""


# Open until the lock is released: to close one of them, or any other descriptor of the file, releases the lock.
_locked_files: list[IO[str]] = []


def lock_folder(folder: Path, is_main: bool = True, reads_only: bool = False) -> contextlib.ExitStack:
    """Hold ``folder/.lock`` on the first rank until the process ends, or until the result is closed.

    A collective where there is a process group.  The lock belongs to the process: children do not inherit it, so that
    none of them outlives it with the lock.

    Args:
        folder: made if it is not there.
        is_main: whether this is the first rank.
        reads_only: a folder that this user may not write to is used without a lock.

    Returns:
        A context manager that releases the lock at the end of its block.

    Raises:
        RunLockedError: on every rank, if another process holds it; one on another host is waited for, as it may be
            one that died with its node.
        RunFolderError: on every rank, if a folder of this path cannot be made or written to.
        OSError: on every rank, for any other fault of the disk.
    """
    lock = contextlib.ExitStack()
    answer: list[Any] = [None]  # the other holder, an error, or None for success
    if is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            answer = [_take(folder / ".lock", lock)]
        except OSError as error:
            if reads_only and error.errno in _READ_ONLY:
                logger.warning(f"{folder} cannot be locked ({error.strerror}); see that no job works there")
            else:
                answer = [error]
    if dist.is_initialized():
        # All ranks raise or none: the others would wait in the next collective.
        dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], OSError):
        if answer[0].errno not in _PATH_ERRORS:
            raise answer[0]
        reason = answer[0].strerror
        raise RunFolderError(f"{folder} cannot be made or written to ({reason}); choose another folder")
    if answer[0]:
        raise RunLockedError(f"{folder} is in use by {answer[0]}; wait for it, stop it, or choose another folder")
    return lock


def _take(path: Path, lock: contextlib.ExitStack) -> str | None:
    """Take the lock, which ``lock`` will release, and return None; or return its holder if it cannot be taken."""
    file = path.open("a+")
    deadline = time.monotonic() + LEASE_S
    while not try_lock(file):
        file.seek(0)
        holder = file.read().strip() or "another process"
        if _is_on_this_host(holder) or time.monotonic() > deadline:
            file.close()
            return holder
        logger.log(NOTICE, f"{path}: held by {holder}; waiting, as it may have died with its node")
        time.sleep(5.0)
    _locked_files.append(file)
    lock.callback(_release, file)
    with contextlib.suppress(OSError):  # on a full disk the lock holds without a name
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
    return None


def _release(file: IO[str]) -> None:
    _locked_files.remove(file)
    file.close()


def _is_on_this_host(holder: str) -> bool:
    return f" on {socket.gethostname()} " in holder
