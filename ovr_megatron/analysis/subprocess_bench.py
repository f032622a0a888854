"""A measurement in a process of its own: the JSON rows that it prints, or why there are none."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def rows_of(module: str, *arguments: object, launcher: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Run ``module`` as a program and collect the JSON objects among the lines of its output.

    Args:
        module: importable.
        arguments: of the program.
        launcher: what starts it, after the interpreter: ``-m torch.distributed.run ...``.

    Raises:
        MeasurementError: it failed.
    """
    command = [sys.executable, *launcher, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise MeasurementError(reason(done.stderr))
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


class MeasurementError(RuntimeError):
    """A measurement that failed, with the line that says why."""


def reason(errors: str) -> str:
    """The last line of ``errors`` that names an exception, or else the last one; at most 200 characters."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()] or ["no message"]
    named = [line for line in lines if re.match(r"(\[rank\d+\]: *)?[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (named or lines)[-1][:200]
