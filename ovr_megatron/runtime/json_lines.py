"""Read files of one JSON object a line, as a run or a job appends them: a damaged line costs that line only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ovr_megatron.runtime.logs import get_logger

logger = get_logger(__name__)


def read_json_lines(path: Path, *needed: str) -> list[dict[str, Any]]:
    """Return the objects of a file in order.

    A line that is no object, or lacks one of the keys ``needed``, is left out and named on stderr. Such a last
    line without a line end is still being written, or was cut off by a crash, and is left out silently.

    Raises:
        OSError: the file cannot be read.
    """
    objects: list[dict[str, Any]] = []
    damaged: list[int] = []
    with path.open("rb") as file:
        for line_number, line in enumerate(file, 1):
            value = json_object(line)
            if value is not None and all(key in value for key in needed):
                objects.append(value)
            elif line.strip() and line.endswith(b"\n"):
                damaged.append(line_number)
    if damaged:
        more = f" and {len(damaged) - 1} more lines" if len(damaged) > 1 else ""
        logger.warning(f"{path}:{damaged[0]}{more}: damaged, left out; the other lines are used")
    return objects


def json_object(line: bytes) -> dict[str, Any] | None:
    """Return the object of a line, None for a line that is none."""
    try:
        value = json.loads(line)
    except ValueError:  # no JSON, or no text: a crash leaves zeros
        return None
    return value if isinstance(value, dict) else None
