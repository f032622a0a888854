"""Run a measurement in a new process and collect the JSON rows that it prints."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.measure import PeakMemory

BenchRow = dict[str, Any]
"""A row of a benchmark's table and of its JSON file: ``name``, ``seconds`` and whatever else was measured."""


_ROOT = Path(__file__).resolve().parents[1]


class MeasurementError(RuntimeError):
    """A measurement that failed, with the line that says why."""


def run_in_subprocess(
    module: str,
    *arguments: object,
    launcher: Sequence[str] = (),
    search_path: Sequence[Path] = (),
    threads: int = 0,
    sample_s: float = 0.0,
) -> list[BenchRow]:
    """Run ``module`` as a program and return the JSON objects among the lines of its output.

    Args:
        module: of the checkout.
        arguments: of the program.
        launcher: arguments of the interpreter that start the program, such as ``-m torch.distributed.run ...``.
        search_path: folders of packages that this environment lacks.
        threads: of OpenMP in each process; 0: as many as for this one.
        sample_s: seconds between samples of the memory of all its processes; each row gets their ``peak_bytes``.  0:
            none.

    Raises:
        MeasurementError: the program failed.
    """
    command = [sys.executable, *launcher, "-m", module, *map(str, arguments)]
    # This package is not installed: Python finds it, and its version of `ovr_megatron`, in the checkout.
    folders = [str(_ROOT), os.environ.get("PYTHONPATH"), *map(str, search_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    sampler = PeakMemory(process.pid, sample_s)
    if sample_s:
        sampler.start()
    output, errors = process.communicate()
    memory = {"peak_bytes": sampler.stop()} if sample_s else {}
    if process.returncode:
        error = MeasurementError(_exception_line(errors))
        error.add_note(errors[-3000:])  # Python prints it below the traceback
        raise error
    # Libraries print to standard output, too: only lines that begin an object are rows.
    return [json.loads(line) | memory for line in output.splitlines() if line.startswith('{"')]


def resident_bytes(field: str) -> int:
    """Return the resident memory of this process: ``VmRSS`` now, ``VmHWM`` at its peak."""
    # `getrusage` would count the peak of the process that started this one, too.
    with open("/proc/self/status") as lines:
        kilobytes = next(line.split()[1] for line in lines if line.startswith(field))
    return int(kilobytes) * 1024


def _exception_line(errors: str) -> str:
    """Return the last line of ``errors`` that names an exception, or else the last one; at most 200 characters."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()] or ["no message"]
    exceptions = [line for line in lines if re.match(r"(\[rank\d+\]: *)?[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (exceptions or lines)[-1][:200]
