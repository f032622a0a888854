"""Write figures, their numbers, summary, report and model card of an experiment."""

from __future__ import annotations

from pathlib import Path

from ovr_megatron.analysis.card import write_card
from ovr_megatron.analysis.experiment import read_experiment
from ovr_megatron.analysis.figures import write_figures
from ovr_megatron.analysis.numbers import write_numbers
from ovr_megatron.analysis.report import write_report
from ovr_megatron.analysis.summary import write_summary
from ovr_megatron.runtime.terminal import printable


def write_everything(run_dir: Path, refresh: int = 0, iteration: int | None = None) -> None:
    """Write figures, numbers, summary, report and the card of an exported model; print their paths and what is missing.

    Raises:
        ExperimentError: the folder holds no run, or a file of it cannot be read.
    """
    experiment = read_experiment(run_dir, iteration)
    for path in write_figures(experiment):
        print(f"figure:  {path}")
    for path in write_numbers(experiment):
        print(f"numbers: {path}")
    print(f"summary: {write_summary(experiment)}")
    print(f"report:  {write_report(experiment, refresh)}", flush=True)
    if experiment.exported:
        print(f"card:    {write_card(experiment, experiment.exported)}")
    for sentence in experiment.missing:
        print(printable(f"missing: {sentence}"))
