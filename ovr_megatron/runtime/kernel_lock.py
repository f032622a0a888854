"""Try to lock a file for this process; light enough for processes that start without torch."""

from __future__ import annotations

import errno
import fcntl
from typing import IO

from ovr_megatron.runtime.logs import get_logger

logger = get_logger(__name__)

_NOT_SUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def try_lock(file: IO[str]) -> bool:
    """Return whether this process now has the lock; also where the file system has no locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno in _NOT_SUPPORTED:
            logger.warning(f"{file.name}: this file system has no locks; start one job only")
            return True
        raise
    return True
