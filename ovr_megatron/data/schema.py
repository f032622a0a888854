"""One row of data: its types, and the error that names a row which cannot be used.

A row is a chat.  A supervised row ends with an assistant message; a prompt row (reinforcement learning,
evaluation) ends with a user message and carries the reference ``answer``.  Images stay unopened here: a
row holds a path, encoded bytes or a picture, and `ovr_megatron.data.images` opens it under limits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import PIL.Image

from ovr_megatron.data.file_slices import FileSlice
from ovr_megatron.data.video_files import VideoFrame
from ovr_megatron.errors import UserError

ENDLESS = 2**31  # length of a source that never runs out
BOX_REQUEST = "Put your final answer in \\boxed{}."
LETTER_REQUEST = "Put the letter of the right option in \\boxed{}."


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
        parts = (self.where, self.field, self.problem)
        # An error of a whole file has no field.
        statement = ": ".join(filter(None, parts))
        return f"{statement}; {self.remedy}"


@dataclass(frozen=True)
class TextPart:
    """Text inside a message."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """An unopened image: one of ``path``, ``data`` (an encoded file), ``image``, ``file`` and ``frame`` is set.

    ``root`` bounds ``path``; ``where`` and ``field`` say in errors which row names the image.
    """

    path: Path | None = None
    image: PIL.Image.Image | None = None
    data: bytes | None = None
    root: Path | None = None
    file: FileSlice | None = None
    frame: VideoFrame | None = None
    where: str = dataclasses.field(default="", compare=False)
    field: str = dataclasses.field(default="image", compare=False)


@dataclass(frozen=True)
class ImageSize:
    """Width and height of an image in pixels, as the file has it and as the model sees it."""

    width: int
    height: int
    resized_width: int
    resized_height: int


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
        texts = [part.text for part in self.parts if isinstance(part, TextPart)]
        return "".join(texts)

    @property
    def is_text(self) -> bool:
        """True if no part is an image or a video."""
        return all(isinstance(part, TextPart) for part in self.parts)


@dataclass(frozen=True)
class Row:
    """A chat with its reference answer.

    ``where`` is ``file:line`` and only serves errors; ``metadata`` is what a rule of rewards reads beside ``answer``.
    """

    messages: tuple[Message, ...]
    answer: str | None = None
    options: tuple[str, ...] = ()
    source: str = ""
    difficulty: float | None = None
    id: str = ""
    where: str = dataclasses.field(default="", compare=False)
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def is_prompt(self) -> bool:
        """True if the row ends with a user message, so that the answer is for the model to give."""
        return self.messages[-1].role == "user"

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the final assistant message; all of them in a prompt row."""
        if self.is_prompt:
            return self.messages
        return self.messages[:-1]

    @property
    def response(self) -> str | None:
        """The text of the final assistant message, None in a prompt row."""
        if self.is_prompt:
            return None
        return self.messages[-1].text


def all_parts(messages: Iterable[Message]) -> list[Part]:
    """Return the parts of all ``messages`` in order."""
    parts: list[Part] = []
    for message in messages:
        parts += message.parts
    return parts


class RowSource(Protocol):
    """Rows by index.  A source of length `ENDLESS` or more is generated and never runs out."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def __getitem__(self, index: int, /) -> Row:
        """Return row ``index``, or raise `RowError` if it cannot be used."""
