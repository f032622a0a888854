"""Questions that others publish as fields, as prompt rows: the request for a box or for a letter comes at their end."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ovr_megatron.data.schema import (
    BOX_REQUEST,
    LETTER_REQUEST,
    Message,
    Part,
    Row,
    RowError,
    TextPart,
    check_answer,
    option_letter,
    parse_text,
)


def prompt_row(
    parts: tuple[Part, ...],
    answer: Any,
    options: Sequence[str],
    where: str,
    *,
    request: str | None = None,
    pictures: Mapping[str, Part] | None = None,
    **known: Any,
) -> Row:
    """A prompt row from the parts of a question.

    Args:
        parts: the question.
        answer: the reference, a text or a number.
        options: contents of the choices, listed after the question.
        where: ``file:line``.
        request: what to say at the end; default: for a letter with ``options``, else for a box.
        pictures: parts that stand for marks in question and options.
        known: further fields of the row.

    Raises:
        RowError: the answer is none, or none of the options.
    """
    asked = list_options(options) + "\n" + (request or (LETTER_REQUEST if options else BOX_REQUEST))
    if parts and isinstance(parts[-1], TextPart):
        parts = (*parts[:-1], TextPart(parts[-1].text + asked))
    else:
        parts = (*parts, TextPart(asked))
    if pictures:
        parts = tuple(piece for part in parts for piece in _set_in(part, pictures))
    known["id"] = known.get("id") or Path(where).name
    message, told = Message("user", parts), parse_text(answer, where, "answer")
    row = Row((message,), answer=told, options=tuple(options), where=where, **known)
    check_answer(row)
    return row


def _set_in(part: Part, pictures: Mapping[str, Part]) -> Iterator[Part]:
    """The pieces of a text, the pictures in the places of their marks."""
    if not isinstance(part, TextPart):
        yield part
        return
    pieces = re.split("(" + "|".join(map(re.escape, pictures)) + ")", part.text)
    yield from (pictures.get(piece) or TextPart(piece) for piece in pieces if piece)


def texts(text: str) -> tuple[Part, ...]:
    """The text as parts, none if it is blank."""
    return (TextPart(text),) if text.strip() else ()


def list_options(options: Sequence[str]) -> str:
    """One line per option; an option that is only its own letter stands in the picture."""
    lines = []
    for i, option in enumerate(options):
        letter = option_letter(i)
        lines.append(f"\n({letter})" + ("" if option == letter else f" {option}"))
    return "".join(lines)


def field_of(raw: Any, key: str, where: str) -> Any:
    """The value of a field; a question must be a text.

    Raises:
        RowError: it is missing.
    """
    value = raw.get(key) if isinstance(raw, Mapping) else None
    if value is None:
        raise RowError(where, key, "is missing", "add the field, or set the format of the source")
    if key == "question" and not (isinstance(value, str) and value.strip()):
        raise RowError(where, key, f"is {type(value).__name__} {value!r:.60}", "give a text")
    return value


def options_of(raw: Mapping[str, Any], where: str, key: str = "options") -> list[str]:
    """Contents of the choices, none if there is no such field.

    Raises:
        RowError: the field is no list of texts.
    """
    found = raw.get(key) or []
    if not isinstance(found, list):
        raise RowError(where, key, f"is {type(found).__name__} {found!r:.60}", "give a list of texts")
    return [parse_text(option, where, f"{key}[{i}]") for i, option in enumerate(found)]
