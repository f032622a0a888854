"""End a command with its exit code, and with one sentence where a user's mistake or a signal ended it."""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ovr_megatron.errors import UserError
from ovr_megatron.runtime.stop import USER_ERROR, JoinError
from ovr_megatron.runtime.terminal import printable, say

# A full disk, a quota, a limit of size, and a file that may not be written.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
# A path with a file in the place of a folder, or a folder in the place of a file, and one that is too long.
_PATH_ERRORS = (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
SENTENCES_ARE_COLLECTED = "OVR_SENTENCES_ARE_COLLECTED"  # set by `ovr_megatron.torchrun`, which prints each one once


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run ``main`` and leave the process with its exit code.

    A `UserError`, a disk that takes no more, or a path that cannot exist, ends with its sentence and code 2, a
    `JoinError` with its own and code 1, Ctrl-C with code 130, and output whose reader has left, as ``head`` does,
    with code 141; none of them prints a traceback.
    """
    try:
        try:
            code = main() or 0
        finally:
            sys.stdout.flush()
    except (UserError, JoinError) as error:
        end_with_sentence(str(error))
        code = USER_ERROR if isinstance(error, UserError) else 1  # a node's fault is worth another try
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        if not reader_left(sys.stdout.fileno()):
            raise  # it was another pipe, to a worker
        # The interpreter flushes standard output once more when it ends; a pipe without a reader would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            end_with_sentence(f"{error}; make room or allow writing there, then start the same command again")
        elif error.errno in _PATH_ERRORS or (isinstance(error, FileExistsError) and os.path.isfile(error.filename)):
            end_with_sentence(f"{error}; give another path")
        else:
            raise
        code = USER_ERROR
    sys.exit(code)


def whole_number(least: int, most: float = math.inf) -> Callable[[str], int]:
    """Return the type of a command-line option that is a whole number from ``least`` to ``most``."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d{1,18}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        if int(text) > most:
            raise argparse.ArgumentTypeError(f"{text!r} is more than {most:,}")
        return int(text)

    return read


def number(least: float = -math.inf, above: float = -math.inf, most: float = math.inf) -> Callable[[str], float]:
    """Return the type of a command-line option that is a finite number, from ``least`` or ``above`` to ``most``."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isfinite(value) and least <= value <= most and value > above:
            return value
        limits = [("of at least", least), ("above", above), ("of at most", most)]
        bounds = " and ".join(f"{words} {limit:g}" for words, limit in limits if math.isfinite(limit))
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number {bounds}".rstrip())

    return read


def end_with_sentence(sentence: str) -> None:
    """Print ``sentence``, or leave it to `ovr_megatron.torchrun`, which prints it once."""
    reported = report_to_launcher(printable(sentence))
    if not (reported and os.environ.get(SENTENCES_ARE_COLLECTED)):
        say(f"error: {sentence}")


def reader_left(descriptor: int) -> bool:
    """Return whether ``descriptor`` is a pipe whose reading end is closed."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def report_to_launcher(sentence: str) -> bool:
    """Write ``sentence`` to ``torchrun``'s file for the error of a worker; return False without ``torchrun``."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return False
    record = {"message": sentence, "extraInfo": {"timestamp": str(int(time.time()))}}
    try:
        Path(path).write_text(json.dumps({"message": record}))
    except OSError:  # the disk that is full may be this one
        return False
    return True
