"""Log through `logging`: the first rank in plain lines, every other rank with its rank and step in front.

A module takes its logger with ``logger = get_logger(__name__)``. Results of a command are no log: they are printed.
"""

from __future__ import annotations

import logging
import os
import sys

from ovr_megatron.runtime.terminal import say

# Worth reading beside the result of a command, so on stderr, but nothing to correct.
NOTICE = 25
_ROOT = "ovr_megatron"
_PREFIXES = {logging.WARNING: "warning: ", logging.ERROR: "error: ", logging.CRITICAL: "error: "}
_step: int | None = None


def get_logger(name: str) -> logging.Logger:
    """Return the logger of the module ``name``; it writes `logging.INFO` to stdout and higher levels to stderr."""
    root = logging.getLogger(_ROOT)
    if not root.handlers:
        handler = _TerminalHandler()
        handler.setFormatter(_RankFormatter())
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        # Libraries put handlers on the root of all loggers, which would print each line a second time.
        root.propagate = False
    return logging.getLogger(name)


def set_step(step: int) -> None:
    """Show ``step`` in the later lines of this process."""
    global _step
    _step = step


class _RankFormatter(logging.Formatter):
    """Format a record as its level and message, on ranks other than the first with rank and step in front."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of ``record``."""
        text = _PREFIXES.get(record.levelno, "") + super().format(record)
        # torch may not be loaded yet, so the rank comes from the launcher's environment.
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            return text
        step = "" if _step is None else f", step {_step}"
        return f"[rank {rank}{step}] {text}"


class _TerminalHandler(logging.Handler):
    """Print each record at once, also where stdout or stderr was replaced or cannot be written."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print ``record``."""
        say(self.format(record), sys.stdout if record.levelno <= logging.INFO else sys.stderr)
