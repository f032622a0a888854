"""Read the chats that a program passes, in the forms that a file of rows may have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ovr_megatron.data.formats import detect, find_reader
from ovr_megatron.data.processing import Processor, TooLongError
from ovr_megatron.data.schema import Row, RowError

Conversation = Row | Mapping[str, Any]
"""A row, or an object as a line of a JSONL file has it: ``{"messages": [...], "images": [...], "answer": ...}``."""


def read_chats(chats: Sequence[Conversation], image_root: Path = Path()) -> list[Row]:
    """Return the rows of ``chats``.

    Args:
        chats: At least one.  An image is a picture of Pillow, the bytes of a file, or a path.
        image_root: The folder that bounds the paths of images.

    Raises:
        RowError: there is none, or one of them cannot be used; named ``chats[i]``.
    """
    if not chats:
        raise RowError("chats", "", "is empty", "give at least one chat")
    rows = []
    for index, chat in enumerate(chats):
        where = f"chats[{index}]"
        if not isinstance(chat, Row):
            read = find_reader(detect(chat, where))
            chat = read(chat, where, image_root)
        rows.append(chat)
    return rows


def fitting_lengths(processor: Processor, rows: Sequence[Row], generation: bool) -> list[int]:
    """Return the tokens of each row.

    Args:
        processor: Measures them.
        rows: To learn from, or to answer.
        generation: As of `Processor.encode`.

    Raises:
        TooLongError: of the first row that is over a limit.
        RowError: a row cannot be used.
    """
    lengths = []
    for length in processor.lengths(rows, generation):
        if isinstance(length, TooLongError):
            raise length
        lengths.append(length)
    return lengths
