"""Run torchrun and end with the run's own error: ``python -m ovr_megatron.torchrun --nproc-per-node 8 -m MODULE ...``.

It takes the options of ``torchrun``.  An error that every rank reports is printed once, without torchrun's summary of
sixty lines, and the exit code is that of the rank that failed first.
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
    # torchrun logs the end of every rank; the messages below say it once.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    os.environ[SENTENCES_ARE_COLLECTED] = "1"  # ranks leave their error in torchrun's error file and print nothing
    try:
        torchrun.run(torchrun.parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        first = error.get_first_failure()[1]
        messages = []
        for rank, failure in sorted(error.failures.items()):
            # Once a rank has failed, torchrun ends the other ranks with SIGTERM: that is no failure of theirs.
            if failure is first or failure.exitcode != -signal.SIGTERM:
                messages.append(describe(rank, failure))
        for message in dict.fromkeys(messages):
            print(printable(message), file=sys.stderr, flush=True)
        # A negative exit code is the number of the signal that ended the rank; a shell adds 128 to it.
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def describe(rank: int, failure: ProcessFailure) -> str:
    """Return the error message that a rank left, or a sentence on how it ended."""
    record = failure.error_file_data.get("message")
    if isinstance(record, dict):
        return f"error: {record['message']}"
    if failure.exitcode < 0:
        return f"rank {rank} was ended by {failure.signal_name()}"
    return f"rank {rank} ended with exit code {failure.exitcode}"


if __name__ == "__main__":
    run_command(launch)
