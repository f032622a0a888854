"""Rows on their way from a pool to its graders: as JSON, images by their paths or as encoded files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ovr_megatron.data.row_json import row_to_json
from ovr_megatron.data.row_parsing import parse_row
from ovr_megatron.data.schema import ImagePart, Message, Part, Row, VideoPart


def encode_row(row: Row) -> dict[str, Any]:
    """Return the object of a row for `decode_row`."""
    messages = []
    for message in row.messages:
        parts = tuple(map(_with_absolute_path, message.parts))
        messages.append(Message(message.role, parts, message.learn))
    return {**row_to_json(replace(row, messages=tuple(messages))), "where": row.where}


def decode_row(raw: dict[str, Any]) -> Row:
    """Return the row of an object of `encode_row`; its images are opened when they are needed."""
    # The trainer has compared paths with their root, where they are absolute here, and has checked the answer.
    return parse_row(raw, raw["where"], Path("/"), needs_answer=False)


def _with_absolute_path(part: Part) -> Part:
    if isinstance(part, VideoPart):
        return replace(part, frames=tuple(map(_absolute, part.frames)))
    return _absolute(part) if isinstance(part, ImagePart) else part


def _absolute(part: ImagePart) -> ImagePart:
    return part if part.path is None else replace(part, path=part.path.absolute(), root=None)
