"""Questions to a chat endpoint in OpenAI's form, and their results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict


class ImageUrlPart(TypedDict):
    """An image of a message in OpenAI's form; ``image_url`` holds a data URL as its ``url``."""

    type: Literal["image_url"]
    image_url: dict[str, str]


class ChatMessage(TypedDict):
    """A message in OpenAI's form."""

    role: str
    content: str | Sequence[Mapping[str, object]]


@dataclass(frozen=True)
class Question:
    """One request: its key in the journal, messages in OpenAI's form, and the sampling seed."""

    key: int
    messages: list[ChatMessage]
    seed: int


@dataclass(frozen=True)
class Completion:
    """Result of a question: a text with its finish reason, or an ``error``; ``tokens`` of prompt and response."""

    key: int
    text: str | None = None
    thought: str | None = None
    finish: str = ""
    tokens: int = 0
    error: str | None = None
    final: bool = True  # False: the same question may succeed later
