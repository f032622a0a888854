"""A grader process: JSON requests on stdin, JSON verdicts on stdout, one a line.

    python -m ovr_megatron.rewards.worker [--timeout-s S] [--memory-mib M]

It writes ``{"ready": true}`` once it can grade.  A request is ``{"response", "answer", "options", "rule",
"thinking"}``, with ``"image"`` and ``"row"`` for a rule that reads them; a verdict is ``{"reason", "box", "score"}``.
The parent enforces the time limit by killing the process.  As a second line of defence the kernel ends it when a
verdict takes twice that long, so that no worker outlives its parent.
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
from ovr_megatron.rewards.request_json import request_from_json
from ovr_megatron.rewards.rules import rule
from ovr_megatron.rewards.verdict import WALL_FACTOR, GradeRequest
from ovr_megatron.runtime.environment import lower_priority


def limit_memory(mebibytes: int) -> None:
    """Bound the address space of this process; beyond it an allocation fails, and the node does not swap."""
    size = mebibytes << 20
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core dumps of killed workers


def set_alarms(timeout_s: float) -> None:
    """End this process after twice ``timeout_s`` of its CPU time, or twice `WALL_FACTOR` times as long by the clock.

    0 cancels the alarms.
    """
    signal.setitimer(signal.ITIMER_PROF, 2 * timeout_s)
    signal.setitimer(signal.ITIMER_REAL, 2 * WALL_FACTOR * timeout_s)


def serve(requests: Iterable[str], verdicts: TextIO, timeout_s: float) -> None:
    """Write a verdict for each line of ``requests``; ``timeout_s`` 0 sets no alarm."""
    for line in requests:
        raw = json.loads(line)
        # Only while it grades: an idle worker may wait for the next request as long as it takes.
        set_alarms(timeout_s)
        request = request_from_json(raw)
        assert isinstance(request.rule, str), "the pool sends weighted rules one by one"
        grade_by_rule = rule(request.rule)
        verdict = grade_by_rule(request)
        set_alarms(0)
        verdict_json = json.dumps(asdict(verdict))
        verdicts.write(f"{verdict_json}\n")
        verdicts.flush()


def main() -> None:
    """Serve stdin until it is closed."""
    parser = argparse.ArgumentParser(description="Grade JSON lines from stdin; one verdict a line on stdout.")
    parser.add_argument("--timeout-s", type=float, default=0.0, help="seconds of CPU time for a verdict (0: no limit)")
    parser.add_argument("--memory-mib", type=int, default=1024, help="address space of this process")
    args = parser.parse_args()
    lower_priority()
    limit_memory(args.memory_mib)
    # The default action ends the process, even inside a long multiplication; a Python handler would wait for its end.
    for alarm in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(alarm, signal.SIG_DFL)
    # Ctrl-C, and Slurm's warning to every process of a step, are for the trainer, which closes stdin when it stops.
    for interruption in (signal.SIGINT, signal.SIGTERM):
        signal.signal(interruption, signal.SIG_IGN)
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it has no timeout; the parent has one
    # Verdicts go to a copy of stdout, and stdout to stderr: no output of a library may look like a verdict.
    verdicts = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    grade(GradeRequest(r"\boxed{x^{2}+\sqrt{2}}", r"\frac{x}{2}"))  # the first use of the parser takes a moment
    verdicts.write('{"ready": true}\n')
    verdicts.flush()
    serve(sys.stdin, verdicts, args.timeout_s)


if __name__ == "__main__":
    main()
