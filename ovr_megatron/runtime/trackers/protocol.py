"""What a tracker does, and what it is opened with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ovr_megatron.errors import UserError
from ovr_megatron.runtime.files import write_whole

RUN_IDS = "tracker_ids.json"


class TrackerError(UserError, ValueError):
    """A tracker that is not known, is not installed or cannot be started; the message says what to do."""


class Tracker(Protocol):
    """Records metrics and texts of one run, on the first rank only."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record ``metrics``, for example ``{"loss/train": 0.3}``, under ``step``.

        A step may come more than once, with other names: an evaluation is logged under the step that it follows.
        """

    def log_text(self, step: int, name: str, text: str) -> None:
        """Record ``text`` under ``name`` and ``step``; a tracker without texts does nothing."""

    def close(self) -> None:
        """Finish the records; nothing is logged afterwards."""


@runtime_checkable
class HistogramTracker(Protocol):
    """A tracker that records histograms as well; one without this method has their quantiles among the metrics."""

    def log_histogram(self, step: int, name: str, histogram: Histogram) -> None:
        """Record ``histogram`` under ``name`` and ``step``."""


@dataclass(frozen=True)
class Histogram:
    """Counts of values in bins of equal width.

    Attributes:
        edges: float64 [b + 1], the smallest value, the edges between the bins, and the largest value.
        counts: int64 [b].
        total: sum of the values.
        squares: sum of their squares.
    """

    edges: np.ndarray
    counts: np.ndarray
    total: float
    squares: float

    def quantile(self, percent: float) -> float:
        """Return the value that ``percent`` of the values do not exceed, at most the width of a bin too high."""
        reached = self.counts.cumsum() >= percent / 100 * self.counts.sum()
        first = int(reached.argmax())
        return float(self.edges[first + 1])

    def merged(self, bins: int) -> Histogram:
        """Return the histogram with ``bins`` bins, a divisor of their number."""
        step = len(self.counts) // bins
        counts = self.counts.reshape(bins, step).sum(1)
        return Histogram(self.edges[::step], counts, self.total, self.squares)


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker is opened for.

    Attributes:
        folder: the run folder, which exists.
        stage: name of the records, for example ``train``.
        first_step: the step that the run begins with; above 0 it resumes, and earlier records from there on are void.
        settings: resolved settings for display; values of environment variables stay ``${oc.env:NAME}``.
    """

    folder: Path
    stage: str
    first_step: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def id_of(self, tracker: str) -> str | None:
        """Return the id under which the service ``tracker`` knows this run, None before its first start.

        Raises:
            TrackerError: the file of the ids is damaged.
        """
        return self._ids().get(tracker)

    def remember_id(self, tracker: str, run_id: str) -> None:
        """Write the id to the run folder, so that the next start goes on in the same run of the service."""
        write_whole(self.folder / RUN_IDS, json.dumps({**self._ids(), tracker: run_id}, indent=1) + "\n")

    def _ids(self) -> dict[str, str]:
        path = self.folder / RUN_IDS
        try:
            ids = json.loads(path.read_text())
        except FileNotFoundError:
            return {}
        except ValueError:
            ids = None
        if not isinstance(ids, dict):
            raise TrackerError(f"{path} is damaged; remove it to begin new runs in run.trackers")
        return ids
