"""Record the steps of a run: metrics and texts in its trackers, spikes as JSON lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from ovr_megatron.config import ColdStartConfig, RLConfig, as_yaml
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.logs import NOTICE, get_logger
from ovr_megatron.runtime.step_lines import StepLines
from ovr_megatron.runtime.trackers.protocol import Histogram, HistogramTracker, TrackedRun, TrackerError
from ovr_megatron.runtime.trackers.table import open_trackers

logger = get_logger(__name__)

LAYERS = "layers.txt"
TIMELINE = "timeline.jsonl"


def record_layers(run: Path, layers: str, cautions: Sequence[str]) -> None:
    """Print the implementation of the ``layers`` and its ``cautions``; write the former to ``RUN/layers.txt``."""
    logger.info(f"layers: {layers}")
    for caution in cautions:
        logger.log(NOTICE, f"note: {caution}")
    (run / LAYERS).write_text(f"{layers}\n")


class RunLog:
    """Passes metrics and texts to trackers and writes ``RUN/spikes.jsonl`` and ``RUN/timeline.jsonl``.

    The default trackers write ``RUN/metrics/STAGE.jsonl`` and ``RUN/tensorboard/STAGE``.
    """

    def __init__(
        self,
        run: Path,
        stage: str,
        resume_at: int = 0,
        trackers: Sequence[str] = ("jsonl", "tensorboard"),
        settings: Mapping[str, Any] | None = None,
    ):
        self.trackers = open_trackers(trackers, TrackedRun(run, stage, resume_at, settings or {}))
        self.spikes = StepLines(run / "spikes.jsonl", resume_at)
        self._timeline: StepLines | None = None
        self._timeline_start = (run / TIMELINE, resume_at)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Record ``values`` under ``step``, for example ``{"loss/train": 0.3}``."""
        for tracker in self.trackers:
            tracker.log(step, values)

    def text(self, step: int, name: str, text: str) -> None:
        """Record ``text`` under ``name``."""
        for tracker in self.trackers:
            tracker.log_text(step, name, text)

    def histogram(self, step: int, name: str, histogram: Histogram) -> None:
        """Record ``histogram`` under ``name`` in the trackers that take one."""
        for tracker in self.trackers:
            if isinstance(tracker, HistogramTracker):
                tracker.log_histogram(step, name, histogram)

    def timeline(self, step: int, record: Mapping[str, object]) -> None:
        """Append what the ranks did in ``step`` to ``RUN/timeline.jsonl``, which supervised training does not have."""
        if self._timeline is None:
            self._timeline = StepLines(*self._timeline_start)
        self._timeline.write(step, record)

    def close(self) -> None:
        """Close every tracker and file."""
        for tracker in self.trackers:
            tracker.close()
        self.spikes.close()
        if self._timeline is not None:
            self._timeline.close()


def open_log(config: ColdStartConfig | RLConfig, resume_at: int, world: World) -> RunLog | None:
    """Open the log of a training run on the first rank; return None on the others.  A collective.

    Raises:
        TrackerError: on every rank, if a tracker cannot be started.
    """
    log = None
    problem: list[str | None] = [None]
    if world.is_main:
        settings = yaml.safe_load(as_yaml(config))
        try:
            log = RunLog(Path(config.run.dir), "train", resume_at, config.run.trackers, settings)
        except TrackerError as error:
            problem = [str(error)]
    # All ranks raise or none: the others would wait in the next collective.
    dist.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise TrackerError(problem[0])
    return log
