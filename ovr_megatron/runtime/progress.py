"""Progress for the person at the terminal: a bar with rate and remaining time, plain lines where there is none."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

_EVERY_S = 15.0
_SHORT_S = 5.0


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
                desc=what,
                unit=unit,
                dynamic_ncols=True,
                leave=not inner,
                delay=_SHORT_S if inner else 0,
            )
            if terminal
            else None
        )

    def update(self, count: int = 1, **shown: Any) -> None:
        """Count ``count`` more and show the values, for example ``loss=0.31``."""
        self.done += count
        if self.bar is not None:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(count)
        elif self.show and (time.monotonic() - self.last_line > _EVERY_S or self._ends_now()):
            self.last_line = time.monotonic()
            self._line(shown)

    def _ends_now(self) -> bool:
        return self.done >= self.total and (not self.inner or time.monotonic() - self.began > _SHORT_S)

    def _line(self, shown: dict[str, Any]) -> None:
        rate = (self.done - self.before) / max(time.monotonic() - self.began, 1e-9)
        left = (self.total - self.done) / rate if rate else 0.0
        values = " ".join(f"{key}={value}" for key, value in shown.items())
        print(
            f"{self.what}: {self.done}/{self.total} {rate:.2f} {self.unit}/s, {left:.0f} s left {values}".rstrip(),
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()
