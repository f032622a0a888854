"""Show progress with pace and remaining time: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from itertools import pairwise
from types import TracebackType

from tqdm import tqdm

from ovr_megatron.runtime.terminal import printable, say

_LINE_INTERVAL_S = 15.0
_SHORT_S = 5.0
_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def duration(seconds: float) -> str:
    """Return ``seconds`` in the two largest of days, hours, minutes and seconds: 566,000 s are ``6 d 13 h``."""
    rest = round(seconds)
    for (unit, size), (smaller, smaller_size) in pairwise(_UNITS):
        if rest >= size:
            count, remainder = divmod(rest, size)
            smaller_count = remainder // smaller_size
            if smaller_count and smaller != "s":
                return f"{count} {unit} {smaller_count} {smaller}"
            return f"{count} {unit}"
    return f"{rest} s"


def pace(done: int, seconds: float, unit: str) -> str:
    """Return how fast ``done`` units went: ``3.2 step/s``, or ``630 s a step`` for what takes longer than a second."""
    if not done:
        return "first one running"
    unit_seconds = seconds / done
    if unit_seconds <= 1:
        return f"{1 / unit_seconds:.1f} {unit}/s"
    article = "an" if unit[0] in "aeiou" else "a"
    digits = 0 if unit_seconds >= 10 else 1
    return f"{unit_seconds:,.{digits}f} s {article} {unit}"


class Progress:
    """Counts ``total`` units of the work ``what``; silent where ``show`` is false (every rank but the first).

    With ``inner`` it is part of longer work, and work of less than five seconds shows nothing.
    """

    def __init__(
        self,
        total: int,
        what: str,
        unit: str = "step",
        show: bool = True,
        start: int = 0,
        inner: bool = False,
    ):
        self.total = total
        self.what = what
        self.unit = unit
        self.done = start
        self.start = start
        self.show = show
        self.inner = inner
        self.began = time.monotonic()
        self.last_line = self.began
        self.bar: tqdm | None = None
        if show and sys.stderr.isatty():
            self.bar = tqdm(
                total=total,
                initial=start,
                desc=printable(what),
                unit=unit,
                dynamic_ncols=True,
                leave=not inner,
                delay=_SHORT_S if inner else 0,
                bar_format="{desc}: {n_fmt}/{total_fmt} |{bar}| {postfix}",
            )

    def update(self, count: int = 1, **values: object) -> None:
        """Count ``count`` more and show the values, for example ``loss=0.31``."""
        self.done += count
        if self.bar is not None:
            self.bar.set_postfix_str(self._text(values), refresh=False)
            self.bar.update(count)
        elif self.show and self._is_line_due():
            self.last_line = time.monotonic()
            # The reader of the lines may have left, as `head` does, and the disk of a log may be full: `say` goes on.
            say(f"{self.what}: {self.done}/{self.total} {self._text(values)}")

    def _is_line_due(self) -> bool:
        """Return whether the last line is old enough, or this one is the last."""
        now = time.monotonic()
        if now - self.last_line > _LINE_INTERVAL_S:
            return True
        return self.done >= self.total and (not self.inner or now - self.began > _SHORT_S)

    def _text(self, values: Mapping[str, object]) -> str:
        """Return pace, remaining time and the values."""
        # Of this process: a resumed run has done the first `start` units at another time.
        done = self.done - self.start
        seconds = time.monotonic() - self.began
        remaining = duration((self.total - self.done) * seconds / done) if done else "?"
        pairs = " ".join(f"{key}={value}" for key, value in values.items())
        return f"{pace(done, seconds, self.unit)}, {remaining} left {pairs}".rstrip()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.close()
