"""A grader process: JSON requests on stdin, JSON verdicts on stdout, one a line.

    python -m ovr_megatron.rewards.worker [--timeout-s S] [--memory-mib M]

It says ``{"ready": true}`` once it can grade.  A request is ``{"response", "answer", "options", "rule", "thinking"}``,
a verdict ``{"reason", "box", "score"}``.  Whoever holds the other end enforces the time limit by killing the process;
as a second line the kernel ends it when a verdict takes twice that long, so that none outlives a dead parent.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import TextIO

from ovr_megatron.rewards.grader import grade
from ovr_megatron.rewards.rules import rule
from ovr_megatron.rewards.verdict import WALL_FACTOR, GradeRequest


def limit_memory(mebibytes: int) -> None:
    """Bound the address space of this process; past it an allocation fails instead of swapping the machine."""
    size = mebibytes << 20
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def set_alarms(timeout_s: float) -> None:
    """End this process after twice ``timeout_s`` of its CPU time, or twice `WALL_FACTOR` times as long by the clock.

    0 takes the alarms back.
    """
    signal.setitimer(signal.ITIMER_PROF, 2 * timeout_s)
    signal.setitimer(signal.ITIMER_REAL, 2 * WALL_FACTOR * timeout_s)


def serve(requests: Iterable[str], verdicts: TextIO, timeout_s: float) -> None:
    """Answer each line of ``requests`` until the last; ``timeout_s`` 0 sets no alarm."""
    for line in requests:
        raw = json.loads(line)
        set_alarms(timeout_s)
        options = tuple(raw.get("options") or ())
        request = GradeRequest(
            raw["response"], raw["answer"], options, raw.get("rule", "auto"), raw.get("thinking", False)
        )
        verdict = rule(request.rule)(request)
        set_alarms(0)
        verdicts.write(json.dumps(asdict(verdict)) + "\n")
        verdicts.flush()


def main() -> None:
    """Serve stdin until it is closed."""
    parser = argparse.ArgumentParser(description="Grade JSON lines from stdin; one verdict a line on stdout.")
    parser.add_argument("--timeout-s", type=float, default=0.0, help="seconds of CPU time for a verdict (0: no limit)")
    parser.add_argument("--memory-mib", type=int, default=1024, help="address space of this process")
    args = parser.parse_args()
    limit_memory(args.memory_mib)
    for number in (signal.SIGALRM, signal.SIGPROF):  # the default ends the process, even inside a long multiplication
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C, and Slurm's warning to every process of a step, are for
        signal.signal(number, signal.SIG_IGN)  # the trainer, which closes stdin when it stops
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the missing clock that we keep outside
    verdicts = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing that a library prints may look like a verdict
    grade(GradeRequest(r"\boxed{x^{2}+\sqrt{2}}", r"\frac{x}{2}"))  # the first use of the parser takes a moment
    verdicts.write('{"ready": true}\n')
    verdicts.flush()
    serve(sys.stdin, verdicts, args.timeout_s)


if __name__ == "__main__":
    main()
