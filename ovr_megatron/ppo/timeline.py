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
        ends: of each rank, the second at which each of its activities ended, from the begin of the first rank's
            iteration.
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
    return {
        "activities": timeline.activities,
        "ends": align_ends([ends for ends, _ in ranks]),
        "lengths": {"width": width, "counts": counts.tolist()},
    }


def align_ends(ranks: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return the ends of all ranks by the clock of the first one, to the millisecond.

    Each rank counts from its own begin, which the first one may reach later, as it writes the log.  The last activity
    of all ranks is a wait for each other, so that it ends for all of them at once.
    """
    aligned = []
    for ends in ranks:
        lead = ends[-1] - ranks[0][-1]
        # What a rank does before the first one begins is none of the iteration.
        aligned.append([max(round(end - lead, 3), 0.0) for end in ends])
    return aligned
