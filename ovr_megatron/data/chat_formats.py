r"""Readers of chats that others publish with ``<image>`` marks in the text: verl's parquet, LLaVA's JSON.

Messages stay as they are, so a set for reinforcement learning should already ask for ``\boxed{}``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ovr_megatron.data.schema import (
    ImagePart,
    Message,
    Part,
    Row,
    RowError,
    TextPart,
    check_answer,
    check_turns,
    parse_image,
    parse_text,
)

IMAGE_MARK = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def read_verl(raw: Any, where: str, image_root: Path) -> Row:
    """Read one row of verl: ``prompt`` (role, content), ``images``, ``reward_model.ground_truth``, ``data_source``.

    ``extra_info.index``, if there, becomes the id; a ``response`` column (verl's SFT files) the final message.
    """
    if raw.get("videos"):
        raise RowError(where, "videos", "are not read", "cut the videos into frames and write rows with 'messages'")
    turns = raw.get("prompt")
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    response = raw.get("response")
    if isinstance(response, str):
        turns = [*_list(turns, where, "prompt"), {"role": "assistant", "content": response}]
    told = raw.get("reward_model")
    truth = told.get("ground_truth") if isinstance(told, Mapping) else None
    extra = raw.get("extra_info")
    index = extra.get("index") if isinstance(extra, Mapping) else None
    row = Row(
        _chat(turns, ("role", "content"), _images(raw.get("images"), where, "images", image_root), where, "prompt"),
        answer=None if truth is None else parse_text(truth, where, "reward_model.ground_truth").strip(),
        source=parse_text(raw.get("data_source") or "", where, "data_source"),
        id=Path(where).name if index is None else parse_text(index, where, "extra_info.index"),
        where=where,
    )
    check_answer(row)
    return row


def read_llava(raw: Any, where: str, image_root: Path) -> Row:
    """Read one row of LLaVA: ``conversations`` (from human or gpt, value), ``image`` (one path or several), ``id``."""
    images = raw.get("image") if raw.get("image") is not None else raw.get("images")
    row = Row(
        _chat(
            raw.get("conversations"), ("from", "value"), _images(images, where, "image", image_root), where,
            "conversations",
        ),
        answer=None if raw.get("answer") is None else parse_text(raw["answer"], where, "answer"),
        source=parse_text(raw.get("source") or raw.get("data_source") or "", where, "source"),
        id=Path(where).name if raw.get("id") is None else parse_text(raw["id"], where, "id"),
        where=where,
    )  # fmt: skip
    check_answer(row)
    return row


def _list(value: Any, where: str, field: str) -> list[Any]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not value:
        raise RowError(where, field, f"is {type(value).__name__} {str(value)[:60]!r}", "give a non-empty list")
    return list(value)


def _images(value: Any, where: str, field: str, root: Path) -> list[ImagePart]:
    if value is None or value == []:
        return []
    if isinstance(value, (str, Mapping)):
        value = [value]
    images = _list(value, where, field)
    return [parse_image(image, where, f"{field}[{i}]", root) for i, image in enumerate(images)]


def _chat(turns: Any, keys: tuple[str, str], images: list[ImagePart], where: str, field: str) -> tuple[Message, ...]:
    """Messages with every image where its mark stands; before the first text where nothing marks any."""
    told: list[tuple[str, str]] = []
    for i, turn in enumerate(_list(turns, where, field)):
        role, text = (turn.get(key) for key in keys) if isinstance(turn, Mapping) else (None, None)
        if role not in _ROLES or not isinstance(text, str):
            remedy = f"give objects with {keys[0]!r} (one of {', '.join(_ROLES)}) and a text {keys[1]!r}"
            raise RowError(where, f"{field}[{i}]", f"is {str(turn)[:60]!r}", remedy)
        told.append((_ROLES[role], text))
    marks = sum(text.count(IMAGE_MARK) for role, text in told if role == "user")
    if marks not in (0, len(images)):
        remedy = "give one image for each mark, or no marks at all"
        raise RowError(where, field, f"has {marks} marks {IMAGE_MARK} and {len(images)} images", remedy)
    waiting = iter(images)
    messages = []
    for role, text in told:
        parts: list[Part] = []
        if role == "user" and not marks:
            parts, waiting = list(waiting), iter(())
        for i, piece in enumerate(text.split(IMAGE_MARK) if role == "user" and marks else [text]):
            parts += [next(waiting)] if i else []
            parts += [TextPart(piece)] if piece.strip() or not (images and role == "user") else []
        messages.append(Message(role, tuple(parts)))
    check_turns(tuple(messages), where, field)
    return tuple(messages)
