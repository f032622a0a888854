"""Figures, report and summary of an experiment's folder, finished or not: ``tools/report.py RUN_DIR``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ovr_megatron.analysis.experiment import ExperimentError, read_experiment
from ovr_megatron.analysis.figures import write_figures
from ovr_megatron.analysis.report import write_report
from ovr_megatron.analysis.summary import write_summary


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and write the three; exits with 2 if the folder holds no run."""
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of an experiment, or of a single run")
    args = parser.parse_args(argv)
    try:
        experiment = read_experiment(args.run_dir)
    except ExperimentError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    for path in write_figures(experiment):
        print(f"figure:  {path}")
    print(f"summary: {write_summary(experiment)}")
    print(f"report:  {write_report(experiment)}")
    for part in experiment.missing:
        print(f"missing: {part}")


if __name__ == "__main__":
    main()
