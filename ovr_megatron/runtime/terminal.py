"""Text for a terminal or a log: foreign text cannot steer it, and a full disk under the log ends no run."""

from __future__ import annotations

import contextlib
import re
import sys
from typing import TextIO

# C0 and C1 controls but tab and line feed, marks that reverse or hide text, and halves of surrogate pairs.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def printable(text: object) -> str:
    """Return ``text`` with every control character written out as an escape, tabs and line feeds aside."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def say(text: object, stream: TextIO | None = None) -> None:
    """Print ``text`` to ``stream`` (stderr) at once; where that cannot be written, nothing is said."""
    stream = stream or sys.stderr
    encoding = stream.encoding or "utf-8"
    with contextlib.suppress(OSError, ValueError):
        print(printable(text).encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
