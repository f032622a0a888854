"""Figures, report, summary and model card of an experiment, finished or not: ``ovr report RUN_DIR``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from ovr_megatron.errors import UserError
from ovr_megatron.runtime.command import whole_number
from ovr_megatron.runtime.terminal import printable


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and write everything."""
    parser = argparse.ArgumentParser(prog="ovr report", description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of an experiment, or of a single run")
    every_help = "write them again every so many seconds until Ctrl-C; an open page follows"
    parser.add_argument("--every", type=whole_number(0), default=0, metavar="SECONDS", help=every_help)
    parser.add_argument(
        "--iteration",
        type=whole_number(0),
        metavar="N",
        help="the timeline of this iteration of the RL (default: the last)",
    )
    args = parser.parse_args(argv)

    # Imported here, so that --help does not wait for torch and Matplotlib.
    from ovr_megatron.analysis.writing import write_everything

    while True:
        try:
            write_everything(args.run_dir, args.every, args.iteration)
        except UserError as error:
            if not args.every:
                raise
            # A run that has not begun, or a file that is just being written: the next round may work.
            print(printable(f"not now: {error}"), flush=True)
        if not args.every:
            return
        try:
            time.sleep(args.every)
        except KeyboardInterrupt:
            return
