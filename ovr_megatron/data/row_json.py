"""Write a row as the JSON object that `ovr_megatron.data.row_parsing.parse_row` reads."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Literal, NotRequired, TypedDict

from ovr_megatron.data.file_slices import read_slice
from ovr_megatron.data.images import frame_png, png_bytes
from ovr_megatron.data.schema import ImagePart, Message, Part, Row, TextPart

ImageJson = str | dict[str, str]


class PartJson(TypedDict, total=False):
    """A part of a message: a text, an image (its path below the root, or PNG bytes in base64), or a video of frames."""

    type: Literal["text", "image", "video"]
    text: str
    image: ImageJson
    video: list[ImageJson]
    fps: float


class MessageJson(TypedDict):
    """A message; ``weight`` 0 is not learned."""

    role: str
    content: str | list[PartJson]
    weight: NotRequired[int]


class RowJson(TypedDict):
    """A row of a file; the stages of the preparation add the fields from ``teacher`` on."""

    messages: list[MessageJson]
    answer: NotRequired[str]
    options: NotRequired[list[str]]
    source: NotRequired[str]
    difficulty: NotRequired[float]
    id: NotRequired[str]
    metadata: NotRequired[dict[str, Any]]
    teacher: NotRequired[str | None]
    loss: NotRequired[float]
    stratum: NotRequired[str]
    weight: NotRequired[float]


def row_to_json(row: Row) -> RowJson:
    """Return the JSON object that `ovr_megatron.data.row_parsing.parse_row` reads back as an equal row.

    Image paths are written relative to their root; pictures without a file are embedded as PNG.
    """
    messages = [_message_to_json(message) for message in row.messages]
    fields: RowJson = {"messages": messages}
    # Fields at their defaults are left out, so that files stay small and comparable.
    if row.answer:
        fields["answer"] = row.answer
    if row.options:
        fields["options"] = list(row.options)
    if row.source:
        fields["source"] = row.source
    if row.difficulty is not None:
        fields["difficulty"] = row.difficulty
    if row.id:
        fields["id"] = row.id
    if row.metadata:
        fields["metadata"] = dict(row.metadata)
    return fields


def _message_to_json(message: Message) -> MessageJson:
    content = _content_to_json(message.parts)
    fields: MessageJson = {"role": message.role, "content": content}
    if not message.learn:
        fields["weight"] = 0
    return fields


def _content_to_json(parts: Sequence[Part]) -> str | list[PartJson]:
    if len(parts) == 1:
        part = parts[0]
        if isinstance(part, TextPart):
            return part.text
    return [_part_to_json(part) for part in parts]


def _part_to_json(part: Part) -> PartJson:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    if isinstance(part, ImagePart):
        return {"type": "image", "image": _image_to_json(part)}
    frames = [_image_to_json(frame) for frame in part.frames]
    return {"type": "video", "video": frames, "fps": part.fps}


def _image_to_json(part: ImagePart) -> ImageJson:
    if part.path is not None:
        path = part.path
        if part.root:
            path = path.relative_to(part.root)
        return str(path)
    data = part.data
    if part.file is not None:
        data = read_slice(part.file)
    if part.image is not None:
        data = png_bytes(part.image)  # without loss: the pixels are those of the row
    if part.frame is not None:
        data = frame_png(part.frame)
    assert data is not None, "an ImagePart has a path, an image or data"
    base64_data = base64.b64encode(data)
    return {"bytes": base64_data.decode()}
