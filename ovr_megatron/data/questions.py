"""Questions that others publish as fields, as prompt rows: the request for a box or for a letter comes at their end."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ovr_megatron.data.row_parsing import check_answer, option_letter, parse_text
from ovr_megatron.data.schema import BOX_REQUEST, LETTER_REQUEST, Message, Part, Row, RowError, TextPart


def prompt_row(
    parts: tuple[Part, ...],
    answer: Any,
    options: Sequence[str],
    where: str,
    *,
    request: str | None = None,
    pictures: Mapping[str, Part] | None = None,
    **fields: Any,
) -> Row:
    """Build a prompt row from the parts of a question.

    Args:
        parts: the question.
        answer: the reference, a text or a number.
        options: contents of the choices, listed after the question.
        where: ``file:line``.
        request: what to say at the end; default: for a letter with ``options``, else for a box.
        pictures: parts that stand for marks in question and options.
        fields: further fields of the row.

    Raises:
        RowError: the answer is none, or none of the options.
    """
    if not request:
        request = LETTER_REQUEST if options else BOX_REQUEST
    ending = f"{list_options(options)}\n{request}"
    question = list(parts)
    last = question[-1] if question else None
    if isinstance(last, TextPart):
        question[-1] = TextPart(last.text + ending)
    else:
        question.append(TextPart(ending))
    if pictures:
        question = _insert_pictures(question, pictures)
    fields["id"] = fields.get("id") or Path(where).name
    message = Message("user", tuple(question))
    row = Row(
        (message,),
        answer=parse_text(answer, where, "answer"),
        options=tuple(options),
        where=where,
        **fields,
    )
    check_answer(row)
    return row


def _insert_pictures(parts: Sequence[Part], pictures: Mapping[str, Part]) -> list[Part]:
    """Split the texts at their marks and return all parts, with the pictures in place of the marks."""
    alternatives = "|".join(map(re.escape, pictures))
    marks = re.compile(f"({alternatives})")  # in a group, so that `split` returns the marks, too
    result: list[Part] = []
    for part in parts:
        if not isinstance(part, TextPart):
            result.append(part)
            continue
        for piece in marks.split(part.text):
            if piece:
                result.append(pictures.get(piece) or TextPart(piece))
    return result


def texts(text: str) -> tuple[Part, ...]:
    """Return the text as parts: none if it is blank."""
    return (TextPart(text),) if text.strip() else ()


def list_options(options: Sequence[str]) -> str:
    """List one option a line; an option that is only its own letter stands in the picture."""
    lines = []
    for i, option in enumerate(options):
        letter = option_letter(i)
        line = f"\n({letter})"
        if option != letter:
            line += f" {option}"
        lines.append(line)
    return "".join(lines)


def field_of(raw: Any, key: str, where: str) -> Any:
    """Return the value of a field; a question must be a text.

    Raises:
        RowError: it is missing.
    """
    value = raw.get(key) if isinstance(raw, Mapping) else None
    if value is None:
        raise RowError(where, key, "is missing", "add the field, or set the format of the source")
    if key == "question":
        require_text(value, where, key)
    return value


def require_text(value: Any, where: str, key: str) -> None:
    """Raise `RowError` unless ``value`` is a text that is not blank."""
    if isinstance(value, str) and value.strip():
        return
    problem = f"is {type(value).__name__} {value!r:.60}"
    raise RowError(where, key, problem, "give a text")


def options_of(raw: Mapping[str, Any], where: str, key: str = "options") -> list[str]:
    """Return the contents of the choices: none if there is no such field.

    Raises:
        RowError: the field is no list of texts.
    """
    options = raw.get(key) or []
    if not isinstance(options, list):
        problem = f"is {type(options).__name__} {options!r:.60}"
        raise RowError(where, key, problem, "give a list of texts")
    contents = []
    for i, option in enumerate(options):
        contents.append(parse_text(option, where, f"{key}[{i}]"))
    return contents
