"""Record what each rank does in an iteration, and how long the responses are: a line of ``RUN/timeline.jsonl``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from ovr_megatron.runtime.exchange import gather_objects

LENGTH_BINS = 64  # of a histogram, from 0 to the limit of prompt and response together


class Lengths(TypedDict):
    """Response lengths: tokens from one bin to the next, and the responses of each bin."""

    width: int
    counts: list[int]


class TimelineRecord(TypedDict):
    """A line of the file, without its step.

    Attributes:
        activities: what every rank does, in order; the first begins with the iteration, each other one where the one
            before it ended.
        ends: of each rank, the second of the iteration at which each of its activities ended.
        lengths: of the responses that are trained on.
    """

    activities: list[str]
    ends: list[list[float]]
    lengths: Lengths


class Timeline:
    """Activities of this rank in an iteration.

    Attributes:
        activities: in order, the same on all ranks.
        ends: seconds from the begin of the iteration to the end of each.
    """

    def __init__(self) -> None:
        self.activities: list[str] = []
        self.ends: list[float] = []
        self._began = time.perf_counter()

    def end(self, activity: str) -> None:
        """Record that ``activity`` ends now."""
        self.activities.append(activity)
        self.ends.append(time.perf_counter() - self._began)


def gather_timeline(timeline: Timeline, lengths: Sequence[int], limit: int) -> TimelineRecord:
    """Return the record of all ranks.  A collective.

    Args:
        timeline: of this rank.
        lengths: tokens of each of this rank's responses.
        limit: most tokens of a prompt and its response together, the same on all ranks.
    """
    width = -(-limit // LENGTH_BINS)
    bins = np.asarray(lengths, dtype=np.int64) // width
    local_counts = np.bincount(bins, minlength=LENGTH_BINS)
    # Milliseconds: a line has a number for each rank and activity.
    local_ends = [round(end, 3) for end in timeline.ends]
    ranks = gather_objects((local_ends, local_counts))
    counts = np.sum([rank_counts for _, rank_counts in ranks], axis=0)
    return {
        "activities": timeline.activities,
        "ends": [ends for ends, _ in ranks],
        "lengths": {"width": width, "counts": counts.tolist()},
    }
