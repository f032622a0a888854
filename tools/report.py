"""Figures, report, summary and model card of an experiment, finished or not: ``tools/report.py RUN_DIR``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ovr_megatron.analysis.card import write_card
from ovr_megatron.analysis.experiment import ExperimentError, read_experiment
from ovr_megatron.analysis.figures import write_figures
from ovr_megatron.analysis.numbers import write_numbers
from ovr_megatron.analysis.report import write_report
from ovr_megatron.analysis.summary import write_summary


def write(run_dir: Path, refresh: int = 0) -> None:
    """Write figures, summary and report, and say where they lie and what is missing.

    Raises:
        ExperimentError: the folder holds no run, or a file of it cannot be read.
    """
    experiment = read_experiment(run_dir)
    for path in write_figures(experiment):
        print(f"figure:  {path}")
    for path in write_numbers(experiment):
        print(f"numbers: {path}")
    print(f"summary: {write_summary(experiment)}")
    print(f"report:  {write_report(experiment, refresh)}", flush=True)
    if experiment.exported:
        print(f"card:    {write_card(experiment, experiment.exported)}")
    for part in experiment.missing:
        print(f"missing: {part}")


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and write the three; exits with 2 if the folder holds no run."""
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of an experiment, or of a single run")
    told = "write them again every so many seconds until Ctrl-C; an open page follows"
    parser.add_argument("--every", type=int, default=0, metavar="SECONDS", help=told)
    args = parser.parse_args(argv)
    if args.every < 0:
        parser.error(f"--every={args.every} must be positive")
    while True:
        try:
            write(args.run_dir, args.every)
        except ExperimentError as error:
            if not args.every:
                parser.exit(2, f"{parser.prog}: {error}\n")
            print(f"not now: {error}", flush=True)  # a run that has not begun, or a file that is just being written
        if not args.every:
            return
        try:
            time.sleep(args.every)
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
