"""One row of data: its types, and their reader from the JSON form described in ``docs/data.md``.

A row is a chat.  A supervised row ends with an assistant message; a prompt row (reinforcement learning,
evaluation) ends with a user message and carries the reference ``answer``.  Images stay unopened here: a
row holds a path, encoded bytes or a picture, and `ovr_megatron.data.images` opens it under limits.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import PIL.Image

from ovr_megatron.data.traces import with_thought
from ovr_megatron.errors import UserError

ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
MAX_ANSWER_CHARACTERS = 512
ENDLESS = 2**31  # length of a source that never runs out
BOX_REQUEST = "Put your final answer in \\boxed{}."
LETTER_REQUEST = "Put the letter of the right option in \\boxed{}."
_OPTION_LETTER = re.compile(r"[(\[]? ?([A-Za-z]) ?[)\]]?[.:]?")


class RowError(UserError, ValueError):
    """A row that cannot be used: where it stands, which field, what is wrong and what to do."""

    def __init__(self, where: str, field: str, problem: str, remedy: str) -> None:
        """Keep the four parts; ``where`` is ``file:line``."""
        super().__init__(where, field, problem, remedy)
        self.where = where
        self.field = field
        self.problem = problem
        self.remedy = remedy

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
    """A turn of one role; ``learn`` is False for a reply that is context and no target of supervised training."""

    role: str
    parts: tuple[Part, ...]
    learn: bool = True

    @property
    def text(self) -> str:
        """The text of all parts, without images and videos."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))


@dataclass(frozen=True)
class Row:
    """A chat with its reference answer.  ``where`` is ``file:line`` and only serves errors."""

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
        raise RowError(where, "row", f"is {_describe(raw)}", "each row must be an object with 'messages'")
    messages = parse_messages(raw.get("messages"), where, "messages", image_root)
    options = raw.get("options")
    if options is not None and not _is_list(options):
        raise RowError(where, "options", f"is {_describe(options)}", "give a list of texts")
    row = Row(
        messages,
        answer=parse_answer(raw, where, prompt=messages[-1].role == "user"),
        options=tuple(parse_text(item, where, f"options[{i}]") for i, item in enumerate(options or ())),
        source=parse_text(raw.get("source") or "", where, "source"),
        difficulty=_parse_number(raw.get("difficulty"), where, "difficulty"),
        id=Path(where).name if raw.get("id") is None else parse_text(raw["id"], where, "id"),
        where=where,
    )
    check_answer(row)
    return row


def parse_messages(
    turns: Any,
    where: str,
    field: str,
    image_root: Path,
    keys: tuple[str, str] = ("role", "content"),
    roles: Mapping[str, str] = ROLES,
) -> tuple[Message, ...]:
    """Check a list of turns and turn it into messages.

    Args:
        turns: objects with a role and a text, or a list of parts; an assistant's may have ``reasoning_content``, which
            becomes its thought, and ``weight`` (0 or 1) or ``loss`` (true or false), which say whether it is learned.
        where: ``file:line``.
        field: name of the list.
        image_root: the folder that bounds image paths.
        keys: names of role and content in a turn.
        roles: our role for each role name of the format.

    Raises:
        RowError: a turn has another form, or user and assistant do not alternate.
    """
    if not _is_list(turns) or not turns:
        raise RowError(where, field, f"is {_describe(turns)}", f"give a non-empty list of {{{', '.join(keys)}}}")
    messages = []
    for i, turn in enumerate(turns):
        messages.append(_parse_message(turn, where, f"{field}[{i}]", image_root, keys, roles))
    check_turns(messages, where, field)
    return tuple(messages)


def _parse_message(
    turn: Any, where: str, field: str, root: Path, keys: tuple[str, str], roles: Mapping[str, str]
) -> Message:
    """Check one turn and turn it into a message; ``field`` is the turn's name in errors."""
    role_key, content_key = keys
    if not isinstance(turn, Mapping):
        raise RowError(where, field, f"is {_describe(turn)}", f"give an object with {role_key!r} and {content_key!r}")
    role = turn.get(role_key)
    if not isinstance(role, str) or role not in roles:
        raise RowError(where, f"{field}.{role_key}", f"is {role!r}", f"use one of {', '.join(roles)}")
    role = roles[role]
    parts = _parse_parts(turn.get(content_key), where, f"{field}.{content_key}", root)
    learn = _parse_learn(turn, where, field)
    if role != "user" and not all(isinstance(part, TextPart) for part in parts):
        problem = f"the {role} message has an image or a video"
        raise RowError(where, f"{field}.{content_key}", problem, "only user messages may have them")
    message = Message(role, parts, learn)
    if thought := turn.get("reasoning_content"):
        text = _join_thought(thought, message.text, where, f"{field}.reasoning_content", role)
        return dataclasses.replace(message, parts=(TextPart(text),))
    return message


def _parse_parts(content: Any, where: str, field: str, root: Path) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (TextPart(content),)
    if not _is_list(content) or not content:
        raise RowError(where, field, f"is {_describe(content)}", "give a text or a non-empty list of parts")
    return tuple(_parse_part(part, where, f"{field}[{i}]", root) for i, part in enumerate(content))


def _join_thought(thought: Any, text: str, where: str, field: str, role: str) -> str:
    """Return the trace of a thought and a reply.

    Raises:
        RowError: the thought is no text, not an assistant's, or the reply has a thought of its own.
    """
    if role != "assistant" or not isinstance(thought, str):
        problem = f"of the {role} is {_describe(thought)}"
        raise RowError(where, field, problem, "give a text, in an assistant message only")
    if "</think>" in text:
        raise RowError(where, field, "stands beside a reply that has a thought of its own", "remove one of the two")
    return with_thought(thought, text)


def _parse_learn(turn: Mapping[str, Any], where: str, field: str) -> bool:
    """Return whether a turn is learned: its ``weight`` and ``loss``, true where it has neither."""
    learn = True
    for key in ("weight", "loss"):
        value = turn.get(key)
        if value is None:
            continue
        if value not in (0, 1):
            raise RowError(where, f"{field}.{key}", f"is {_describe(value)}", "give 1 (learned) or 0 (context only)")
        learn = learn and bool(value)
    return learn


def _parse_part(part: Any, where: str, field: str, root: Path) -> Part:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in ("text", "image", "video"):
        raise RowError(where, f"{field}.type", f"is {kind!r}", "use text, image or video")
    value = part.get(kind)
    field = f"{field}.{kind}"
    if kind != "text" and value is None:
        return TextPart(f"<{kind}>")  # the mark of a medium that stands in a column, see `ovr_megatron.data.media`
    if kind == "image":
        return parse_image(value, where, field, root)
    if kind == "video":
        return parse_video(value, part.get("fps"), where, field, root)
    if not isinstance(value, str):
        raise RowError(where, field, f"is {_describe(value)}", "give a text")
    return TextPart(value)


def parse_video(value: Any, fps: Any, where: str, field: str, root: Path) -> VideoPart:
    """Turn a list of frames, each as `parse_image` takes it, into a `VideoPart`; without ``fps`` it has 2 a second.

    Raises:
        RowError: it is no list of images, or ``fps`` is no positive number.
    """
    if not _is_list(value) or not value:
        remedy = "video files are not decoded: cut it into frames, and give the non-empty list of its frame images"
        raise RowError(where, field, f"is {_describe(value)}", remedy)
    frames = tuple(parse_image(frame, where, f"{field}[{i}]", root) for i, frame in enumerate(value))
    rate = _parse_number(fps, where, f"{field}.fps")
    if rate is not None and rate <= 0:
        raise RowError(where, f"{field}.fps", f"is {rate}", "give a positive number of frames a second")
    return VideoPart(frames, 2.0 if rate is None else rate)


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
    data = None
    if isinstance(value, Mapping):
        data = value.get("bytes")
        if data is None:
            value = value.get("path")
    if isinstance(value, PIL.Image.Image):
        return ImagePart(image=value, where=where, field=field)
    if isinstance(data, bytes):
        return ImagePart(data=data, where=where, field=field)
    if isinstance(data, str):
        try:
            # Validated: without it, characters outside the alphabet would be skipped.
            return ImagePart(data=base64.b64decode(data, validate=True), where=where, field=field)
        except binascii.Error as error:
            raise RowError(where, field, f"'bytes' is not base64 ({error})", "encode the image file anew") from error
    if not isinstance(value, str) or not value:
        raise RowError(where, field, f"is {_describe(value)}", "give the path of an image file")
    if "://" in value or value.startswith("data:"):
        raise RowError(where, field, f"{value[:80]!r} is a URL", "download the image and give its path")
    return ImagePart(path=root / value, root=root, where=where, field=field)


def check_turns(messages: Sequence[Message], where: str, field: str = "messages") -> None:
    """Raise `RowError` unless user and assistant alternate, the user first, and no message is empty."""
    roles = [message.role for message in messages]
    dialogue = roles[1:] if roles[0] == "system" else roles
    expected = ["user" if i % 2 == 0 else "assistant" for i in range(len(dialogue))]
    if not dialogue or dialogue != expected:
        raise RowError(where, field, f"roles are {', '.join(roles)}", "user and assistant must alternate, user first")
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
    if row.options and not _names_option(answer, row.options):
        remedy = f"give a letter {option_letter(0)}..{option_letter(len(row.options) - 1)} or the text of an option"
        raise RowError(row.where, "answer", f"{answer!r} is none of the {len(row.options)} options", remedy)


def parse_answer(raw: Mapping[str, Any], where: str, prompt: bool) -> str | None:
    """Return the reference answer of a row: its ``answer``, or in a prompt row without one its ``solution``.

    Raises:
        RowError: the field is no text, or the solution is a derivation.
    """
    if raw.get("answer") is not None:
        return parse_text(raw["answer"], where, "answer")
    if not prompt or raw.get("solution") is None:
        return None
    solution = parse_text(raw["solution"], where, "solution").strip()
    if "\\boxed" in solution:
        raise RowError(where, "solution", "holds a derivation", "put its final answer into a field 'answer'")
    return solution.removeprefix("<answer>").removesuffix("</answer>").strip()


def _names_option(answer: str, options: Sequence[str]) -> bool:
    """Return whether an answer is an option's text or its letter, in forms such as B, b, (B) and [B]."""
    if answer in {option.strip() for option in options}:
        return True
    letter = _OPTION_LETTER.fullmatch(answer)
    return letter is not None and ord(letter[1].upper()) - ord("A") < len(options)


def option_letter(index: int) -> str:
    """Return the letter of option ``index``: A for 0."""
    return chr(ord("A") + index)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def parse_text(value: Any, where: str, field: str) -> str:
    """Return a text, or a number as text; raise `RowError` for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):  # a bool is an int
        return str(value)
    raise RowError(where, field, f"is {_describe(value)}", "give a text")


def _parse_number(value: Any, where: str, field: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise RowError(where, field, f"is {_describe(value)}", "give a number")


def _describe(value: Any) -> str:
    """Say in an error what a value is: missing, empty, or its type and its beginning."""
    if value is None:
        return "missing"
    if value == "" or value == []:
        return "empty"
    return f"{type(value).__name__} {str(value)[:60]!r}"
