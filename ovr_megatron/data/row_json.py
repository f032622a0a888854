"""Write a row as the JSON object that `ovr_megatron.data.schema.parse_row` reads."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from ovr_megatron.data.schema import ImagePart, Message, Part, Row, TextPart


def row_to_json(row: Row) -> dict[str, Any]:
    """Return the JSON object that `ovr_megatron.data.schema.parse_row` reads back as an equal row.

    Image paths are written relative to their root; pictures without a file are embedded as PNG.
    """
    fields: dict[str, Any] = {
        "messages": [_message_to_json(message) for message in row.messages],
        "answer": row.answer,
        "options": list(row.options),
        "source": row.source,
        "difficulty": row.difficulty,
        "id": row.id,
    }
    # Fields at their defaults are left out, so that files stay small and comparable.
    return {key: value for key, value in fields.items() if value not in (None, [], "")}


def _message_to_json(message: Message) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": _content_to_json(message.parts)}
    return fields if message.learn else {**fields, "weight": 0}


def _content_to_json(parts: Sequence[Part]) -> str | list[dict[str, Any]]:
    if len(parts) == 1 and isinstance(parts[0], TextPart):
        return parts[0].text
    return [_part_to_json(part) for part in parts]


def _part_to_json(part: Part) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    if isinstance(part, ImagePart):
        return {"type": "image", "image": _image_to_json(part)}
    return {"type": "video", "video": [_image_to_json(frame) for frame in part.frames], "fps": part.fps}


def _image_to_json(part: ImagePart) -> str | dict[str, str]:
    if part.path is not None:
        path = part.path.relative_to(part.root) if part.root else part.path
        return str(path)
    data = part.data
    if part.image is not None:
        buffer = io.BytesIO()
        part.image.save(buffer, "PNG")
        data = buffer.getvalue()
    assert data is not None, "an ImagePart has a path, an image or data"
    return {"bytes": base64.b64encode(data).decode()}
