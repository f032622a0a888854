"""How a command ends: with its exit code, and with one sentence where a user's mistake or a signal ended it."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ovr_megatron.errors import UserError
from ovr_megatron.runtime.stop import USER_ERROR, JoinError

SENTENCES_ARE_COLLECTED = "OVR_SENTENCES_ARE_COLLECTED"  # set by `ovr_megatron.torchrun`, which prints each one once


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run ``main`` and leave the process with its exit code.

    A `UserError` ends with its sentence and code 2, a `JoinError` with its own and code 1, Ctrl-C with code 130, and a
    reader of the output that has left, as ``head`` does, with code 141; none of them with a traceback.
    """
    try:
        try:
            code = main() or 0
        finally:
            sys.stdout.flush()
    except (UserError, JoinError) as error:
        reported = report_to_launcher(str(error))
        if not (reported and os.environ.get(SENTENCES_ARE_COLLECTED)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        code = USER_ERROR if isinstance(error, UserError) else 1  # a node's fault is worth another try
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        if not reader_left(sys.stdout.fileno()):
            raise  # of another pipe, to a worker
        # The interpreter flushes standard output once more when it ends; a pipe without a reader would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    sys.exit(code)


def reader_left(descriptor: int) -> bool:
    """Return whether ``descriptor`` is a pipe whose reading end is closed."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def report_to_launcher(sentence: str) -> bool:
    """Leave ``sentence`` where ``torchrun`` looks for what ended a worker; return False without ``torchrun``."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return False
    record = {"message": sentence, "extraInfo": {"timestamp": str(int(time.time()))}}
    Path(path).write_text(json.dumps({"message": record}))
    return True
