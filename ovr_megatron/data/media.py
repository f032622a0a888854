"""Media in columns beside a text: each is placed where its mark stands, and none is dropped without an error.

``images`` and ``videos`` (or ``image`` and ``video``) stand beside a chat or a question whose text says ``<image>`` and
``<video>`` where they belong, as EasyR1, ms-swift, LLaMA-Factory and LLaVA write them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import PIL.Image

from ovr_megatron.data.file_slices import FileSlice
from ovr_megatron.data.row_parsing import parse_image, parse_video
from ovr_megatron.data.schema import ImagePart, Message, Part, RowError, TextPart, VideoPart
from ovr_megatron.data.video_files import is_video_name

IMAGE_MARK = "<image>"
VIDEO_MARK = "<video>"
IMAGE_COLUMNS = ("images", "image")
VIDEO_COLUMNS = ("videos", "video")

# Qwen's own tokens around one placeholder, as some sets write them into the text.
_QWEN_MARKS = (
    ("<|vision_start|><|image_pad|><|vision_end|>", IMAGE_MARK),
    ("<|vision_start|><|video_pad|><|vision_end|>", VIDEO_MARK),
)
_ANY_MARK = re.compile(r"<(?:image|video|audio)>|<\|(?:vision_start|vision_end|vision_pad|image_pad|video_pad)\|>")
_MEDIUM_NAME = re.compile(
    r"(?:\w+_)?(?:image|img|picture|photo|video|audio)s?(?:_?(?:path|file|url|name|byte|base64|b64)s?)?(?:_?\d+)?",
    re.IGNORECASE,
)
_MEDIUM_FILE = re.compile(
    r"\S+\.(?:png|jpe?g|webp|gif|bmp|tiff?|mp4|avi|mov|mkv|webm|wav|mp3|flac|ogg|m4a)", re.IGNORECASE
)
_LABELS = re.compile(r"(?:\w*_)?(?:u?u?id|source|split|answer|solution|index)", re.IGNORECASE)  # may look like a file
_REMEDY = "cut videos into frames, drop the column if the text does without, or remove the row"


@dataclass(frozen=True)
class ColumnMedia:
    """The images and videos of a row's columns, in order; ``field`` names the column that errors point at."""

    images: Sequence[ImagePart] = ()
    videos: Sequence[VideoPart] = ()
    field: str = ""


def is_medium(name: str, value: Any) -> bool:
    """Return whether a field holds an image, a video or audio: by its form, or by its name where it holds a text."""
    if isinstance(value, (bytes, PIL.Image.Image, FileSlice)):
        return True
    if isinstance(value, Mapping):
        # `datasets` gives an object all the keys of its column, null where the file has none.
        keys = {key for key, item in value.items() if item is not None}
        if not keys:
            return False
        is_file = keys <= {"bytes", "path"}
        is_audio = {"array", "sampling_rate"} <= keys
        return is_file or is_audio or _is_medium_name(name)
    if isinstance(value, str):
        if not value.strip() or _LABELS.fullmatch(name):
            return False
        if _is_medium_name(name):
            return True
        return _MEDIUM_FILE.fullmatch(value) is not None
    if isinstance(value, Sequence):
        return any(is_medium(name, item) for item in value)
    return False


def refuse_unread(
    raw: Mapping[str, Any],
    read: Collection[str],
    where: str,
    prefix: str = "",
) -> None:
    """Raise `RowError` for the first field of ``raw`` that holds a medium and is not one of ``read``."""
    for name, value in raw.items():
        if name not in read and is_medium(name, value):
            beginning = str(value)[:60]
            problem = f"holds an image, a video or audio that this format does not read: {beginning!r}"
            remedy = f"give images in a column 'images'; {_REMEDY}"
            raise RowError(where, prefix + name, problem, remedy)


def parse_columns(raw: Mapping[str, Any], where: str, image_root: Path) -> ColumnMedia:
    """Read the columns `IMAGE_COLUMNS` and `VIDEO_COLUMNS` of ``raw``; a video is a file or the list of its frames.

    Raises:
        RowError: both names of a column are filled, or a value cannot be read.
    """
    image_field, values = _read_column(raw, IMAGE_COLUMNS, where)
    images = []
    for i, value in enumerate(values):
        image = parse_image(value, where, f"{image_field}[{i}]", image_root)
        images.append(image)
    video_field, values = _read_column(raw, VIDEO_COLUMNS, where)
    if video_field == "video" and len(values) > 1:
        # The column of one video may hold its frames without a list around them.
        if isinstance(values[0], (str, Mapping)) and not is_video_name(values[0]):
            values = [values]
    fps = raw.get("fps")
    videos = []
    for i, value in enumerate(values):
        video = parse_video(value, fps, where, f"{video_field}[{i}]", image_root)
        videos.append(video)
    return ColumnMedia(images, videos, image_field or video_field)


def place_media(
    messages: tuple[Message, ...],
    media: ColumnMedia,
    where: str,
    text_field: str,
) -> tuple[Message, ...]:
    """Put media at the marks of the user's texts; media without marks of their kind go before the first user's text.

    Args:
        messages: A chat of text parts.
        media: The images and videos to place.
        where: ``file:line``.
        text_field: The field that holds the text, for errors.

    Raises:
        RowError: the numbers of marks and media differ, or the chat has media of its own.
    """
    messages = tuple(_with_plain_marks(message) for message in messages)
    user_texts = [message.text for message in messages if message.role == "user"]
    text = "\n".join(user_texts)  # apart, so that no mark begins in one text and ends in the next
    parts_by_mark: dict[str, Sequence[Part]] = {
        IMAGE_MARK: media.images,
        VIDEO_MARK: media.videos,
    }
    media_by_mark: dict[str, Iterator[Part]] = {}
    leading: list[Part] = []
    for mark, parts in parts_by_mark.items():
        count = text.count(mark)
        if count == len(parts):
            media_by_mark[mark] = iter(parts)  # one iterator for all messages: marks are counted over the chat
        elif count == 0:
            leading += parts
        else:
            kind = mark.strip("<>")
            problem = f"has {count} marks {mark}, and the row has {len(parts)} {kind}s"
            raise RowError(where, text_field, problem, "give one for each mark, or no marks at all")
    if not media.images and not media.videos:
        return messages
    if not all(message.is_text for message in messages):
        problem = "has images or videos beside a chat that has some of its own"
        raise RowError(where, media.field, problem, "give them either in the column or in the content")
    return tuple(_insert_media(message, media_by_mark, leading) for message in messages)


def refuse_marks(messages: Sequence[Message], where: str, text_field: str) -> None:
    """Raise `RowError` if a user's text has a mark of a medium: the medium is missing."""
    for message in messages:
        # A reply may well write a mark; only in a question it stands for a medium.
        if message.role != "user":
            continue
        if mark := _ANY_MARK.search(message.text):
            problem = f"has {mark[0]} in a user's text, and no medium for it"
            raise RowError(where, text_field, problem, "give the medium, or take the mark out of the text")


def _is_medium_name(name: str) -> bool:
    return _MEDIUM_NAME.fullmatch(name) is not None


def _read_column(
    raw: Mapping[str, Any],
    names: tuple[str, str],
    where: str,
) -> tuple[str, Sequence[Any]]:
    """Return name and values of the filled column of two that mean the same; an empty name where neither is filled."""
    columns = {name: _column_values(raw.get(name)) for name in names}
    filled = [name for name, values in columns.items() if values]
    if not filled:
        return "", []
    if len(filled) > 1:
        raise RowError(where, filled[1], f"stands beside {filled[0]!r}", "give one of the two columns")
    return filled[0], columns[filled[0]]


def _column_values(column: Any) -> Sequence[Any]:
    """Return the media of a column as a list: a list as it is, a single medium as a list of one."""
    if isinstance(column, Sequence) and not isinstance(column, (str, bytes)):
        return column
    if column is None or column == "":
        return []
    if isinstance(column, Mapping) and all(value is None for value in column.values()):
        return []
    return [column]


def _with_plain_marks(message: Message) -> Message:
    """Return the message with `IMAGE_MARK` and `VIDEO_MARK` in place of Qwen's tokens for them."""
    if message.role != "user" or "<|vision_start|>" not in message.text:
        return message
    parts: list[Part] = []
    for part in message.parts:
        if isinstance(part, TextPart):
            text = part.text
            for tokens, mark in _QWEN_MARKS:
                text = text.replace(tokens, mark)
            part = TextPart(text)
        parts.append(part)
    return replace(message, parts=tuple(parts))


def _insert_media(
    message: Message,
    media_by_mark: Mapping[str, Iterator[Part]],
    leading: list[Part],
) -> Message:
    """Return a user's message with its media inserted; ``leading`` goes to the first such message and is emptied."""
    if message.role != "user":
        return message
    parts = list(leading)
    leading.clear()
    alternatives = "|".join(media_by_mark)
    marks = re.compile(f"({alternatives})")  # in a group, so that `split` returns the marks, too
    for part in message.parts:
        assert isinstance(part, TextPart), "a chat with columns has texts only"
        # Without a mark the pattern is empty and would split the text at every character.
        pieces = marks.split(part.text) if media_by_mark else [part.text]
        for piece in pieces:
            if piece in media_by_mark:
                parts.append(next(media_by_mark[piece]))
            elif piece.strip():
                parts.append(TextPart(piece))
    return replace(message, parts=tuple(parts))
