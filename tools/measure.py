"""Run a command and measure it: ``tools/measure.py --out FILE COMMAND ...`` writes its wall time and peak memory.

Memory is the proportional set size (PSS) of the command and all its descendants, summed once a second: a page
that n processes share counts 1/n in each.  The exit status is the command's.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from ovr_megatron.runtime.command import number, run_command


def tree_memory(pid: int) -> int:
    """Return the bytes of PSS of process ``pid`` and its descendants; a process that ends meanwhile counts nothing."""
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


class PeakMemory(threading.Thread):
    """Sample the memory of a process tree every ``every`` seconds until `stop`; ``peak`` is in bytes."""

    def __init__(self, pid: int, every: float = 1.0) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.every = every
        self.peak = 0
        self.ended = threading.Event()

    def run(self) -> None:
        """Sample; the first time at once."""
        while True:
            self.peak = max(self.peak, tree_memory(self.pid))
            if self.ended.wait(self.every):  # not a sleep: `stop` ends the wait at once
                return

    def stop(self) -> int:
        """End the sampling and return the peak."""
        self.ended.set()
        self.join()
        return self.peak


def measure(command: list[str], every: float) -> tuple[int, float, int]:
    """Run ``command``; return its exit status as in a shell, its seconds, and its peak memory in bytes.

    Ctrl-C reaches the command from the terminal, and SIGTERM is passed on; then we wait until the command has ended.
    """
    began = time.monotonic()
    process = subprocess.Popen(command)
    sampler = PeakMemory(process.pid, every)
    sampler.start()
    # The command decides how it ends; its status and peak memory are recorded then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signal_number, frame: process.send_signal(signal_number))
    status = process.wait()
    seconds = time.monotonic() - began
    return (128 - status if status < 0 else status), seconds, sampler.stop()


def record(path: Path, seconds: float, peak: int, add: bool) -> None:
    """Write time and peak; ``add`` adds the time in the file and keeps the higher peak."""
    if add and path.is_file():
        before = json.loads(path.read_text())
        seconds += before["wall_seconds"]
        peak = max(peak, before["peak_memory_bytes"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"wall_seconds": round(seconds, 3), "peak_memory_bytes": peak}) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, run, record, and leave with the command's exit status."""
    parser = argparse.ArgumentParser(
        prog="measure.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON file to write")
    parser.add_argument(
        "--every", type=number(above=0), default=1.0, metavar="S", help="seconds between samples (default: 1)"
    )
    parser.add_argument("--add", action="store_true", help="add to what the file says: a command that was continued")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND ...", help="what to run")
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("no command to run")
    try:
        status, seconds, peak = measure(command, args.every)
    except OSError as error:
        parser.exit(127, f"{parser.prog}: {command[0]}: {error.strerror}\n")
    record(args.out, seconds, peak, args.add)
    sys.exit(status)


if __name__ == "__main__":
    run_command(main)
