"""Trackers that write into the run folder: JSON lines, which reports and replays read, and TensorBoard events."""

from __future__ import annotations

from collections.abc import Mapping

from torch.utils.tensorboard.summary import histogram_raw
from torch.utils.tensorboard.summary import text as text_summary

from ovr_megatron.runtime.events import EventFile
from ovr_megatron.runtime.step_lines import StepLines
from ovr_megatron.runtime.trackers.protocol import Histogram, TrackedRun


class JsonlTracker:
    """Appends metrics to ``RUN/metrics/STAGE.jsonl``; it records no texts."""

    def __init__(self, run: TrackedRun):
        self.lines = StepLines(run.folder / "metrics" / f"{run.stage}.jsonl", run.first_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line."""
        self.lines.write(step, dict(metrics))

    def log_text(self, step: int, name: str, text: str) -> None:
        """Do nothing: responses have files of their own."""

    def close(self) -> None:
        """Close the file."""
        self.lines.close()


class TensorBoardTracker:
    """Appends events to a new file in ``RUN/tensorboard/STAGE``."""

    def __init__(self, run: TrackedRun):
        self.events = EventFile(run.folder / "tensorboard" / run.stage, run.first_step or None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append an event for each metric."""
        self.events.scalars(step, metrics)

    def log_text(self, step: int, name: str, text: str) -> None:
        """Append ``text`` verbatim."""
        self.events.summary(step, text_summary(name, as_code(text)))

    def log_histogram(self, step: int, name: str, histogram: Histogram) -> None:
        """Append ``histogram``, which its page *Histograms* shows over the steps."""
        count = int(histogram.counts.sum())
        smallest, *limits = histogram.edges.tolist()
        sums = (histogram.total, histogram.squares)
        self.events.summary(
            step, histogram_raw(name, smallest, limits[-1], count, *sums, limits, histogram.counts.tolist())
        )

    def close(self) -> None:
        """Close the file."""
        self.events.close()


def as_code(text: str) -> str:
    """Return ``text`` in Markdown that shows it verbatim: an indented line is code."""
    return "".join(f"    {line}\n" for line in text.splitlines())
