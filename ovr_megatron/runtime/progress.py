"""Progress for the person at the terminal: a bar with pace and remaining time, plain lines where there is none."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

from ovr_megatron.runtime.terminal import printable, say

_EVERY_S = 15.0
_SHORT_S = 5.0
_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def duration(seconds: float) -> str:
    """Return ``seconds`` in the two largest of days, hours, minutes and seconds: 566,000 s are ``6 d 13 h``."""
    rest = round(seconds)
    for index, (unit, size) in enumerate(_UNITS):
        if rest >= size and size > 1:
            smaller, smaller_size = _UNITS[index + 1]
            count = rest % size // smaller_size
            return f"{rest // size} {unit} {count} {smaller}" if count and smaller != "s" else f"{rest // size} {unit}"
    return f"{rest} s"


def pace(done: int, seconds: float, unit: str) -> str:
    """Return how fast ``done`` units went: ``3.2 step/s``, or ``630 s a step`` for what takes longer than a second."""
    if not done:
        return "first one running"
    each = seconds / done
    if each <= 1:
        return f"{1 / each:.1f} {unit}/s"
    article = "an" if unit[0] in "aeiou" else "a"
    return f"{each:,.0f} s {article} {unit}" if each >= 10 else f"{each:.1f} s {article} {unit}"


class Progress:
    """Counts ``total`` units of ``what``; silent where ``show`` is false (every rank but the first).

    With ``inner``, it is part of a longer one: nothing shows of what takes less than five seconds.
    """

    def __init__(
        self, total: int, what: str, unit: str = "step", show: bool = True, start: int = 0, inner: bool = False
    ):
        self.total, self.what, self.unit, self.done = total, what, unit, start
        self.show, self.inner = show, inner
        self.began, self.before, self.last_line = time.monotonic(), start, time.monotonic()
        terminal = show and sys.stderr.isatty()
        self.bar = (
            tqdm(
                total=total,
                initial=start,
                desc=printable(what),
                unit=unit,
                dynamic_ncols=True,
                leave=not inner,
                delay=_SHORT_S if inner else 0,
                bar_format="{desc}: {n_fmt}/{total_fmt} |{bar}| {postfix}",
            )
            if terminal
            else None
        )

    def update(self, count: int = 1, **shown: Any) -> None:
        """Count ``count`` more and show the values, for example ``loss=0.31``."""
        self.done += count
        if self.bar is not None:
            self.bar.set_postfix_str(self._text(shown), refresh=False)
            self.bar.update(count)
        elif self.show and (time.monotonic() - self.last_line > _EVERY_S or self._ends_now()):
            self.last_line = time.monotonic()
            self._line(shown)

    def _ends_now(self) -> bool:
        return self.done >= self.total and (not self.inner or time.monotonic() - self.began > _SHORT_S)

    def _text(self, shown: dict[str, Any]) -> str:
        """Pace, remaining time and the values."""
        done, seconds = self.done - self.before, time.monotonic() - self.began
        left = duration((self.total - self.done) * seconds / done) if done else "?"
        values = " ".join(f"{key}={value}" for key, value in shown.items())
        return f"{pace(done, seconds, self.unit)}, {left} left {values}".rstrip()

    def _line(self, shown: dict[str, Any]) -> None:
        # Whoever read the lines may have left, as `head` does, and the disk of a log may be full: the work goes on.
        say(f"{self.what}: {self.done}/{self.total} {self._text(shown)}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()
