"""``torchrun`` that ends with what ended the run: ``python -m ovr_megatron.torchrun --nproc-per-node 8 -m MODULE ...``.

It takes the options of ``torchrun``.  A mistake that every rank finds is printed once, the account of sixty lines is
left out, and the exit code is that of the rank that failed first.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from ovr_megatron.runtime.command import SENTENCES_ARE_COLLECTED, run_command
from ovr_megatron.runtime.terminal import printable


def launch() -> int:
    """Start the ranks and wait for them; return the exit code of the first that failed, or 0."""
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    os.environ[SENTENCES_ARE_COLLECTED] = "1"
    try:
        torchrun.run(torchrun.parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        first = error.get_first_failure()[1]
        lines = []
        for rank, failure in sorted(error.failures.items()):
            # Once a rank has failed, torchrun ends the others with SIGTERM: that is no failure of theirs.
            if failure is first or failure.exitcode != -signal.SIGTERM:
                lines.append(describe(rank, failure))
        for line in dict.fromkeys(lines):
            print(printable(line), file=sys.stderr, flush=True)
        exit_code = first.exitcode
        return exit_code if exit_code > 0 else 128 - exit_code
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def describe(rank: int, failure: ProcessFailure) -> str:
    """Return the sentence that a rank left, or how it ended."""
    record = failure.error_file_data.get("message")
    if isinstance(record, dict):
        return f"error: {record['message']}"
    if failure.exitcode < 0:
        return f"rank {rank} was ended by {failure.signal_name()}"
    return f"rank {rank} ended with exit code {failure.exitcode}"


if __name__ == "__main__":
    run_command(launch)
