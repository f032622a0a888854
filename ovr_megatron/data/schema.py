"""One row of data: its types, and the way from and to the JSON form described in ``docs/data.md``.

A row is a chat.  A supervised row ends with an assistant message; a prompt row (reinforcement learning,
evaluation) ends with a user message and carries the reference ``answer``.  Images stay unopened here: a
row holds a path, encoded bytes or a picture, and `ovr_megatron.data.images` opens it under limits.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import PIL.Image

from ovr_megatron.errors import UserError

ROLES = ("system", "user", "assistant")
MAX_ANSWER_CHARACTERS = 512
ENDLESS = 2**31  # length of a source that never runs out
BOX_REQUEST = "Put your final answer in \\boxed{}."
LETTER_REQUEST = "Put the letter of the right option in \\boxed{}."


class RowError(UserError, ValueError):
    """A row that cannot be used: where it stands, which field, what is wrong and what to do."""

    def __init__(self, where: str, field: str, problem: str, remedy: str) -> None:
        """Keep the four parts; ``where`` is ``file:line``."""
        super().__init__(where, field, problem, remedy)
        self.where, self.field, self.problem, self.remedy = where, field, problem, remedy

    def __str__(self) -> str:
        """Return ``where: field: problem; remedy``."""
        return ": ".join(part for part in (self.where, self.field, self.problem) if part) + f"; {self.remedy}"


@dataclass(frozen=True)
class TextPart:
    """Text inside a message."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """An unopened image: exactly one of ``path``, ``data`` (an encoded file) and ``image`` is set.

    ``root`` bounds ``path``; ``where`` and ``field`` say in errors which row names the image.
    """

    path: Path | None = None
    image: PIL.Image.Image | None = None
    data: bytes | None = None
    root: Path | None = None
    where: str = dataclasses.field(default="", compare=False)
    field: str = dataclasses.field(default="image", compare=False)


@dataclass(frozen=True)
class VideoPart:
    """A video as its frames in order, ``fps`` of them a second."""

    frames: tuple[ImagePart, ...]
    fps: float


Part = TextPart | ImagePart | VideoPart


@dataclass(frozen=True)
class Message:
    """What one role says."""

    role: str
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The text of all parts, without images and videos."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))


@dataclass(frozen=True)
class Row:
    """A chat with what is known about its answer.  ``where`` is ``file:line`` and only serves errors."""

    messages: tuple[Message, ...]
    answer: str | None = None
    options: tuple[str, ...] = ()
    source: str = ""
    difficulty: float | None = None
    id: str = ""
    where: str = dataclasses.field(default="", compare=False)

    @property
    def is_prompt(self) -> bool:
        """True if the row ends with a user message, so that the answer is for the model to give."""
        return self.messages[-1].role == "user"

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the final assistant message; all of them in a prompt row."""
        return self.messages if self.is_prompt else self.messages[:-1]

    @property
    def response(self) -> str | None:
        """The text of the final assistant message, None in a prompt row."""
        return None if self.is_prompt else self.messages[-1].text


class RowSource(Protocol):
    """Rows by index.  A source of length `ENDLESS` or more is generated and never runs out."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def __getitem__(self, index: int, /) -> Row:
        """Return row ``index``, or raise `RowError` if it cannot be used."""


def parse_row(raw: Mapping[str, Any], where: str, image_root: Path) -> Row:
    """Check one decoded JSON object and turn it into a `Row`.

    Args:
        raw: the object; fields that are missing and fields that are null are the same.
        where: ``file:line``, for errors and as the ``id`` of a row without one.
        image_root: the folder that bounds the image paths of the row.

    Raises:
        RowError: a field is missing, has the wrong form, or the answer cannot be verified.
    """
    if not isinstance(raw, Mapping):
        raise RowError(where, "row", f"is {_kind(raw)}", "each row must be an object with 'messages'")
    found = raw.get("messages")
    if not _is_list(found) or not found:
        raise RowError(where, "messages", f"is {_kind(found)}", "give a non-empty list of {role, content}")
    messages = tuple(_message(item, where, f"messages[{i}]", image_root) for i, item in enumerate(found))
    check_turns(messages, where)
    options = raw.get("options")
    if options is not None and not _is_list(options):
        raise RowError(where, "options", f"is {_kind(options)}", "give a list of texts")
    row = Row(
        messages,
        answer=None if raw.get("answer") is None else parse_text(raw["answer"], where, "answer"),
        options=tuple(parse_text(item, where, f"options[{i}]") for i, item in enumerate(options or ())),
        source=parse_text(raw.get("source") or "", where, "source"),
        difficulty=_number(raw.get("difficulty"), where, "difficulty"),
        id=Path(where).name if raw.get("id") is None else parse_text(raw["id"], where, "id"),
        where=where,
    )
    check_answer(row)
    return row


def row_to_json(row: Row) -> dict[str, Any]:
    """Return the JSON object that `parse_row` reads back as an equal row.

    Image paths are written relative to their root; pictures without a file are embedded as PNG.
    """
    fields: dict[str, Any] = {
        "messages": [{"role": m.role, "content": _content_to_json(m.parts)} for m in row.messages],
        "answer": row.answer,
        "options": list(row.options),
        "source": row.source,
        "difficulty": row.difficulty,
        "id": row.id,
    }
    return {key: value for key, value in fields.items() if value not in (None, [], "")}


def _message(item: Any, where: str, field: str, root: Path) -> Message:
    if not isinstance(item, Mapping):
        raise RowError(where, field, f"is {_kind(item)}", "give an object with 'role' and 'content'")
    role, content = item.get("role"), item.get("content")
    if role not in ROLES:
        raise RowError(where, f"{field}.role", f"is {role!r}", f"use one of {', '.join(ROLES)}")
    field = f"{field}.content"
    if isinstance(content, str):
        return Message(role, (TextPart(content),))
    if not _is_list(content) or not content:
        raise RowError(where, field, f"is {_kind(content)}", "give a text or a non-empty list of parts")
    parts = tuple(_part(part, where, f"{field}[{i}]", root) for i, part in enumerate(content))
    if role != "user" and not all(isinstance(part, TextPart) for part in parts):
        raise RowError(where, field, f"the {role} message has an image or a video", "only user messages may have them")
    return Message(role, parts)


def _part(part: Any, where: str, field: str, root: Path) -> Part:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in ("text", "image", "video"):
        raise RowError(where, f"{field}.type", f"is {kind!r}", "use text, image or video")
    value, field = part.get(kind), f"{field}.{kind}"
    if kind == "image":
        return parse_image(value, where, field, root)
    if kind == "video":
        if not _is_list(value) or not value:
            raise RowError(where, field, f"is {_kind(value)}", "give the non-empty list of its frame images")
        frames = tuple(parse_image(frame, where, f"{field}[{i}]", root) for i, frame in enumerate(value))
        fps = _number(part.get("fps"), where, f"{field}.fps") or 2.0
        if fps <= 0:
            raise RowError(where, f"{field}.fps", f"is {fps}", "give a positive number of frames a second")
        return VideoPart(frames, fps)
    if not isinstance(value, str):
        raise RowError(where, field, f"is {_kind(value)}", "give a text")
    return TextPart(value)


def parse_image(value: Any, where: str, field: str, root: Path) -> ImagePart:
    """Turn the value of an image field into an unopened `ImagePart`.

    Args:
        value: a path relative to ``root``, a picture, or ``{"bytes": ..., "path": ...}`` as the data set
            libraries store it (bytes, or base64 text in JSON; the path counts only where the bytes are null).
        where: ``file:line`` of the row.
        field: name of the field.
        root: the folder that bounds paths.

    Raises:
        RowError: none of these, or a URL.
    """
    data = value.get("bytes") if isinstance(value, Mapping) else None
    if isinstance(value, Mapping) and data is None:
        value = value.get("path")
    if isinstance(value, PIL.Image.Image):
        return ImagePart(image=value, where=where, field=field)
    if isinstance(data, bytes):
        return ImagePart(data=data, where=where, field=field)
    if isinstance(data, str):
        try:
            return ImagePart(data=base64.b64decode(data, validate=True), where=where, field=field)
        except binascii.Error as error:
            raise RowError(where, field, f"'bytes' is not base64 ({error})", "encode the image file anew") from error
    if not isinstance(value, str) or not value:
        raise RowError(where, field, f"is {_kind(value)}", "give the path of an image file")
    if "://" in value or value.startswith("data:"):
        raise RowError(where, field, f"{value[:80]!r} is a URL", "download the image and give its path")
    return ImagePart(path=root / value, root=root, where=where, field=field)


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
        return str(part.path.relative_to(part.root) if part.root else part.path)
    data = part.data
    if part.image is not None:
        buffer = io.BytesIO()
        part.image.save(buffer, "PNG")
        data = buffer.getvalue()
    assert data is not None, "an ImagePart has a path, an image or data"
    return {"bytes": base64.b64encode(data).decode()}


def check_turns(messages: tuple[Message, ...], where: str, field: str = "messages") -> None:
    """Raise `RowError` unless user and assistant take turns, the user first, and every message says something."""
    turns = [message.role for message in messages]
    spoken = turns[1:] if turns[0] == "system" else turns
    expected = ["user" if i % 2 == 0 else "assistant" for i in range(len(spoken))]
    if not spoken or spoken != expected:
        raise RowError(where, field, f"roles are {', '.join(turns)}", "user and assistant must alternate, user first")
    for i, message in enumerate(messages):
        if all(isinstance(part, TextPart) for part in message.parts) and not message.text.strip():
            raise RowError(where, f"{field}[{i}].content", "is empty", "give a text or remove the row")


def check_answer(row: Row) -> None:
    """Raise `RowError` unless the answer has a verifiable form: a short text, one of the options if there are any.

    Only a supervised row may come without an answer.
    """
    answer = (row.answer or "").strip()
    if not answer:
        if row.is_prompt:
            remedy = "a row that ends with a user message needs the final answer; add it or remove the row"
            raise RowError(row.where, "answer", "is missing or empty", remedy)
        return
    if len(answer) > MAX_ANSWER_CHARACTERS:
        problem = f"has {len(answer)} characters, which is no verifiable final answer"
        remedy = f"give the bare result, at most {MAX_ANSWER_CHARACTERS} characters"
        raise RowError(row.where, "answer", problem, remedy)
    letters = {option_letter(i) for i in range(len(row.options))}
    if row.options and answer not in letters | {option.strip() for option in row.options}:
        remedy = f"give a letter {option_letter(0)}..{option_letter(len(row.options) - 1)} or the text of an option"
        raise RowError(row.where, "answer", f"{answer!r} is none of the {len(row.options)} options", remedy)


def option_letter(index: int) -> str:
    """Return the letter of option ``index``: A for 0."""
    return chr(ord("A") + index)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def parse_text(value: Any, where: str, field: str) -> str:
    """Return a text, or a number as text; raise `RowError` for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise RowError(where, field, f"is {_kind(value)}", "give a text")


def _number(value: Any, where: str, field: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise RowError(where, field, f"is {_kind(value)}", "give a number")


def _kind(value: Any) -> str:
    if value is None or value == "" or value == []:
        return "missing" if value is None else "empty"
    return f"{type(value).__name__} {str(value)[:60]!r}"
