"""Read files of one JSON object a line, strictly or as a run or a job appends them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ovr_megatron.runtime.logs import get_logger

logger = get_logger(__name__)


class JsonLine(NamedTuple):
    """A line that is not blank: its number from 1, the offset of its first byte in the file, and its bytes."""

    number: int
    offset: int
    content: bytes

    @property
    def is_complete(self) -> bool:
        """Return whether the line has its line end; the last one lacks it while it is written or after a crash."""
        return self.content.endswith(b"\n")

    def parse(self) -> dict[str, Any]:
        """Return the object of the line.

        Raises:
            ValueError: the line is not UTF-8 (`UnicodeDecodeError`), not JSON or no object; says which.
        """
        text = self.content.removesuffix(b"\n").decode("utf-8-sig")
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON at column {error.colno} ({error.msg})") from None
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__}, not an object")
        return value

    def parse_or_none(self) -> dict[str, Any] | None:
        """Return the object of the line, None for a line that is none: a crash leaves parts of lines, or zeros."""
        try:
            return self.parse()
        except ValueError:
            return None


def json_lines(path: Path) -> Iterator[JsonLine]:
    """Yield the lines of a file that are not blank, undecoded.

    Raises:
        OSError: the file cannot be read.
    """
    offset = 0
    with path.open("rb") as file:
        for number, content in enumerate(file, 1):
            if not content.isspace():
                yield JsonLine(number, offset, content)
            offset += len(content)


def read_json_lines(path: Path, *needed: str) -> list[dict[str, Any]]:
    """Return the objects of a file in order; a damaged line costs that line only.

    A line that is no object, or lacks one of the keys ``needed``, is left out and named on stderr. Such a last
    line without a line end is still being written, or was cut off by a crash, and is left out silently.

    Raises:
        OSError: the file cannot be read.
    """
    objects = []
    damaged: list[int] = []
    for line in json_lines(path):
        value = line.parse_or_none()
        if value is not None and all(key in value for key in needed):
            objects.append(value)
        elif line.is_complete:
            damaged.append(line.number)
    if damaged:
        more = f" and {len(damaged) - 1} more lines" if len(damaged) > 1 else ""
        logger.warning(f"{path}:{damaged[0]}{more}: damaged, left out; the other lines are used")
    return objects
