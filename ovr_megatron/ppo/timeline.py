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
        activities: what every rank does, in order; each begins where the one before it ended.
        begins: of each rank, the second at which it began the iteration; 0 for the earliest.
        ends: of each rank, the second at which each of its activities ended.
        lengths: of the responses that are trained on.
    """

    activities: list[str]
    begins: list[float]
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

    def end(self, activity: str) -> float:
        """Record that ``activity`` ends now, and return its seconds."""
        begin = self.ends[-1] if self.ends else 0.0
        end = time.perf_counter() - self._began
        self.activities.append(activity)
        self.ends.append(end)
        return end - begin


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
    ranks = gather_objects((timeline.ends, local_counts))
    counts = np.sum([rank_counts for _, rank_counts in ranks], axis=0)
    begins, ends = align_ranks([rank_ends for rank_ends, _ in ranks])
    return {
        "activities": timeline.activities,
        "begins": begins,
        "ends": ends,
        "lengths": {"width": width, "counts": counts.tolist()},
    }


def align_ranks(ranks: Sequence[Sequence[float]]) -> tuple[list[float], list[list[float]]]:
    """Return the begin of each rank and its ends by one clock, to the millisecond.

    Each rank counts from its own begin, which the first one reaches later than others, as it writes the log.  The last
    activity of all ranks is a wait for each other, so that it ends for all of them at once.
    """
    last = max(ends[-1] for ends in ranks)
    begins = [round(last - ends[-1], 3) for ends in ranks]
    aligned = []
    for ends in ranks:
        late = last - ends[-1]
        aligned.append([round(late + end, 3) for end in ends])
    return begins, aligned
