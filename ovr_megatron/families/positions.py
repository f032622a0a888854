"""What the positions of a document are computed from: its visuals, and the rule after a video.  No torch, no NumPy."""

from __future__ import annotations

from dataclasses import dataclass

# The rules by which a text goes on after a video, see `Family.positions`.
AFTER_VIDEO = ("grid", "extent")


@dataclass(frozen=True)
class Visual:
    """An image or a video between two stretches of text.

    Attributes:
        grid: Patches in time, height and width (t, h, w), before the merger.
        seconds: Seconds from one of the t slices to the next; None for a still image.
        times: Seconds of each slice from the beginning, where a family writes them into the text.
    """

    grid: tuple[int, int, int]
    seconds: float | None = None
    times: tuple[float, ...] = ()

    def features(self, merge: int) -> int:
        """Return the number of tokens it takes: patches after merging ``merge`` x ``merge`` of them."""
        t, h, w = self.grid
        return t * (h // merge) * (w // merge)
