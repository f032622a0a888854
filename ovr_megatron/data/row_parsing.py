"""Read a row from the JSON form described in ``docs/data.md``, field by field.

The readers of other forms share the parsers of single fields.  Each names its field in errors; of several faults of a
row, the order of the calls decides which one is named.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from ovr_megatron.data.file_slices import FileSlice
from ovr_megatron.data.images import resolve_in_root
from ovr_megatron.data.part_forms import PART_KINDS, data_url_content, decode_base64, part_value
from ovr_megatron.data.schema import ImagePart, Message, Part, Row, RowError, TextPart, VideoPart
from ovr_megatron.data.traces import END_OF_THOUGHT, with_thought
from ovr_megatron.data.video_files import SUFFIXES, VideoFileError, is_video_name, sample_frames

ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
MAX_ANSWER_CHARACTERS = 512
MAX_STRUCTURED_CHARACTERS = 32_768  # of lists of boxes and the like
DEFAULT_FPS = 2.0  # frames a second of a video without a rate
_OPTION_LETTER = re.compile(r"[(\[]? ?([A-Za-z]) ?[)\]]?[.:]?")


def parse_row(raw: Mapping[str, Any], where: str, image_root: Path, needs_answer: bool = True) -> Row:
    """Check one decoded JSON object and turn it into a `Row`.

    Args:
        raw: the object; fields that are missing and fields that are null are the same.
        where: ``file:line``, for errors and as the ``id`` of a row without one.
        image_root: the folder that bounds the image paths of the row.
        needs_answer: whether a row that ends with a user message is refused without an answer.

    Raises:
        RowError: a field is missing, has the wrong form, or the answer cannot be verified.
    """
    if not isinstance(raw, Mapping):
        raise RowError(where, "row", f"is {_describe(raw)}", "each row must be an object with 'messages'")
    messages = parse_messages(raw.get("messages"), where, "messages", image_root)
    is_prompt = messages[-1].role == "user"
    raw_options = raw.get("options")
    if raw_options is not None and not _is_list(raw_options):
        raise RowError(where, "options", f"is {_describe(raw_options)}", "give a list of texts")
    answer = parse_answer(raw, where, prompt=is_prompt)
    options = []
    for i, option in enumerate(raw_options or ()):
        options.append(parse_text(option, where, f"options[{i}]"))
    row = Row(
        messages,
        answer=answer,
        options=tuple(options),
        source=parse_text(raw.get("source") or "", where, "source"),
        difficulty=_parse_number(raw.get("difficulty"), where, "difficulty"),
        id=parse_id(raw.get("id"), where, "id"),
        where=where,
        metadata=parse_metadata(raw.get("metadata"), where),
    )
    check_answer(row, needs_answer)
    return row


def parse_metadata(value: Any, where: str) -> dict[str, Any]:
    """Return the object of a row that rules of rewards may read beside the answer, empty where there is none.

    Raises:
        RowError: it is no object, or holds what JSON does not.
    """
    if value is None:
        return {}
    try:
        if not isinstance(value, Mapping):
            raise TypeError
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise RowError(where, "metadata", f"is {_describe(value)}", "give an object of JSON values") from None
    return dict(value)


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
        remedy = f"give a non-empty list of {{{', '.join(keys)}}}"
        raise RowError(where, field, f"is {_describe(turns)}", remedy)
    messages = []
    for i, turn in enumerate(turns):
        turn_field = f"{field}[{i}]"
        message = _parse_message(turn, where, turn_field, image_root, keys, roles)
        messages.append(message)
    check_turns(messages, where, field)
    return tuple(messages)


def _parse_message(
    turn: Any,
    where: str,
    field: str,
    root: Path,
    keys: tuple[str, str],
    roles: Mapping[str, str],
) -> Message:
    """Check one turn and turn it into a message; ``field`` is the turn's name in errors."""
    role_key, content_key = keys
    if not isinstance(turn, Mapping):
        remedy = f"give an object with {role_key!r} and {content_key!r}"
        raise RowError(where, field, f"is {_describe(turn)}", remedy)
    role = turn.get(role_key)
    if not isinstance(role, str) or role not in roles:
        names = ", ".join(roles)
        remedy = f"use one of {names}"
        if role is None and "from" in turn:
            remedy = "a list of turns with 'from' and 'value' is called 'conversations'"
        elif role == "tool":
            remedy += "; turns of tools cannot be learned"
        raise RowError(where, f"{field}.{role_key}", "is missing" if role is None else f"is {role!r}", remedy)
    role = roles[role]
    content = turn.get(content_key)
    content_field = f"{field}.{content_key}"
    parts = _parse_parts(content, where, content_field, root)
    learn = _parse_learn(turn, where, field)
    message = Message(role, parts, learn)
    if role != "user" and not message.is_text:
        problem = f"the {role} message has an image or a video"
        raise RowError(where, content_field, problem, "only user messages may have them")
    thought = turn.get("reasoning_content")
    if not thought:
        return message
    thought_field = f"{field}.reasoning_content"
    text = _join_thought(thought, message.text, where, thought_field, role)
    return dataclasses.replace(message, parts=(TextPart(text),))


def _parse_parts(content: Any, where: str, field: str, root: Path) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (TextPart(content),)
    if not _is_list(content) or not content:
        raise RowError(where, field, f"is {_describe(content)}", "give a text or a non-empty list of parts")
    parts = []
    for i, part in enumerate(content):
        part_field = f"{field}[{i}]"
        parts.append(_parse_part(part, where, part_field, root))
    return tuple(parts)


def _join_thought(
    thought: Any,
    text: str,
    where: str,
    field: str,
    role: str,
) -> str:
    """Return the trace of a thought and a reply.

    Raises:
        RowError: the thought is no text, not an assistant's, or the reply has a thought of its own.
    """
    if role != "assistant" or not isinstance(thought, str):
        problem = f"of the {role} is {_describe(thought)}"
        raise RowError(where, field, problem, "give a text, in an assistant message only")
    if END_OF_THOUGHT in text:
        raise RowError(where, field, "stands beside a reply that has a thought of its own", "remove one of the two")
    return with_thought(thought, text)


def _parse_learn(turn: Mapping[str, Any], where: str, field: str) -> bool:
    """Return whether a turn is learned: its ``weight`` and ``loss``, true where it has neither."""
    learn = True
    for key in ("weight", "loss"):
        value = turn.get(key)
        if value is None:
            continue
        # True and false are equal to 1 and 0.
        if value not in (0, 1):
            problem = f"is {_describe(value)}"
            raise RowError(where, f"{field}.{key}", problem, "give 1 (learned) or 0 (context only)")
        learn = learn and bool(value)
    return learn


def _parse_part(part: Any, where: str, field: str, root: Path) -> Part:
    name = part.get("type") if isinstance(part, Mapping) else None
    kind = PART_KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        names = ", ".join(PART_KINDS)
        raise RowError(where, f"{field}.type", f"is {name!r}", f"use one of {names}")
    key, value = part_value(part, kind)
    field = f"{field}.{key}"
    if kind != "text" and value is None:
        return TextPart(f"<{kind}>")  # the mark of a medium that stands in a column, see `ovr_megatron.data.media`
    if kind == "image":
        return parse_image(value, where, field, root)
    if kind == "video":
        return parse_video(value, part.get("fps"), where, field, root)
    if not isinstance(value, str):
        raise RowError(where, field, f"is {_describe(value)}", "give a text")
    return TextPart(value)


def parse_video(
    value: Any,
    fps: Any,
    where: str,
    field: str,
    root: Path,
) -> VideoPart:
    """Turn a video file, or a list of frames, each as `parse_image` takes it, into a `VideoPart`.

    Of a file ``fps`` frames a second are taken; without ``fps`` there are 2 a second.

    Raises:
        RowError: it is neither, the file cannot be decoded, or ``fps`` is no positive number.
    """
    rate = _parse_fps(fps, where, f"{field}.fps")
    if is_video_name(value):
        return _open_video(value, rate, where, field, root)
    if not _is_list(value) or not value:
        remedy = f"give the path of a video file ({', '.join(SUFFIXES)}), or the non-empty list of its frame images"
        raise RowError(where, field, f"is {_describe(value)}", remedy)
    frames = []
    for i, frame in enumerate(value):
        frame_field = f"{field}[{i}]"
        frames.append(parse_image(frame, where, frame_field, root))
    return VideoPart(tuple(frames), rate)


def _parse_fps(fps: Any, where: str, field: str) -> float:
    rate = _parse_number(fps, where, field)
    if rate is None:
        return DEFAULT_FPS
    if rate <= 0:
        raise RowError(where, field, f"is {rate}", "give a positive number of frames a second")
    return rate


def _open_video(value: str, fps: float, where: str, field: str, root: Path) -> VideoPart:
    """Choose the frames of a video file; their pixels are decoded when they are needed."""
    name = value.removeprefix("file://")
    if "://" in name or name.startswith("data:"):
        raise RowError(where, field, f"{name[:80]!r} is a URL", "download the video and give its path")
    # Compared with its root now: the header says how many frames there are.
    part = ImagePart(path=root / name, root=root, where=where, field=field)
    path = resolve_in_root(part, root / name, "video")
    try:
        frames, rate = sample_frames(path, fps)
    except VideoFileError as error:
        remedy = "give a whole video file, a lower fps, or the list of its frame images"
        raise RowError(where, field, f"video {name!r} {error}", remedy) from error
    parts = [ImagePart(frame=frame, where=where, field=field) for frame in frames]
    return VideoPart(tuple(parts), rate)


def parse_image(value: Any, where: str, field: str, root: Path) -> ImagePart:
    """Turn the value of an image field into an unopened `ImagePart`.

    Args:
        value: a path relative to ``root``, a ``file:`` or ``data:`` URL, a picture, bytes or a part of a file, or
            ``{"bytes": ..., "path": ...}`` as the data set libraries store it (bytes, or base64 text in JSON; the path
            counts only where the bytes are null).
        where: ``file:line`` of the row.
        field: name of the field.
        root: the folder that bounds paths.

    Raises:
        RowError: none of these, or a URL of another kind.
    """
    data = value if isinstance(value, bytes) else None
    if isinstance(value, Mapping):
        data = value.get("bytes")
        if data is None:
            value = value.get("path")
    if isinstance(value, PIL.Image.Image):
        return ImagePart(image=value, where=where, field=field)
    if isinstance(value, FileSlice):
        return ImagePart(file=value, where=where, field=field)
    if isinstance(data, bytes):
        return ImagePart(data=data, where=where, field=field)
    if isinstance(data, str):
        return ImagePart(data=decode_base64(data, "'bytes'", where, field), where=where, field=field)
    if not isinstance(value, str) or not value:
        raise RowError(where, field, f"is {_describe(value)}", "give the path of an image file")
    if (encoded := data_url_content(value)) is not None:
        return ImagePart(data=decode_base64(encoded, "the data: URL", where, field), where=where, field=field)
    value = value.removeprefix("file://")
    if "://" in value or value.startswith("data:"):
        raise RowError(where, field, f"{value[:80]!r} is a URL", "download the image and give its path")
    # Compared with its root when it is opened: only then are links followed.
    return ImagePart(path=root / value, root=root, where=where, field=field)


def check_turns(messages: Sequence[Message], where: str, field: str = "messages") -> None:
    """Raise `RowError` unless user and assistant alternate, the user first, and no message is empty."""
    roles = [message.role for message in messages]
    dialogue = roles[1:] if roles[0] == "system" else roles
    turns = len(dialogue)
    expected = ["user", "assistant"] * turns
    # Cut to the length: a dialogue may end with the user.
    if not dialogue or dialogue != expected[:turns]:
        problem = f"roles are {', '.join(roles)}"
        raise RowError(where, field, problem, "user and assistant must alternate, user first")
    for i, message in enumerate(messages):
        if message.is_text and not message.text.strip():
            raise RowError(where, f"{field}[{i}].content", "is empty", "give a text or remove the row")


def check_answer(row: Row, needs_answer: bool = True) -> None:
    """Raise `RowError` unless the answer has a verifiable form: a short text, one of the options if there are any.

    A supervised row may come without an answer, and a prompt where ``needs_answer`` is false.
    """
    answer = (row.answer or "").strip()
    if not answer:
        if row.is_prompt and needs_answer:
            remedy = (
                "a row that ends with a user message needs the final answer; add it, or for supervised fine-tuning the "
                "assistant's reply, or remove the row"
            )
            raise RowError(row.where, "answer", "is missing or empty", remedy)
        return
    limit = MAX_STRUCTURED_CHARACTERS if is_structured(answer) else MAX_ANSWER_CHARACTERS
    if len(answer) > limit:
        problem = f"has {len(answer)} characters, which is no verifiable final answer"
        remedy = f"give the bare result, at most {limit} characters"
        raise RowError(row.where, "answer", problem, remedy)
    if row.options and not _names_option(answer, row.options):
        count = len(row.options)
        problem = f"{answer!r} is none of the {count} options"
        last_letter = option_letter(count - 1)
        remedy = f"give a letter A..{last_letter} or the text of an option"
        raise RowError(row.where, "answer", problem, remedy)


def parse_answer(raw: Mapping[str, Any], where: str, prompt: bool) -> str | None:
    """Return the reference answer of a row: its ``answer``, or in a prompt row without one its ``solution``.

    Raises:
        RowError: the field is no text, or the solution is a derivation.
    """
    answer = raw.get("answer")
    if is_regions(answer):
        try:
            return json.dumps(answer, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise RowError(where, "answer", f"is {_describe(answer)}", "give a text or JSON values") from None
    if answer is not None:
        return parse_text(raw["answer"], where, "answer")
    if not prompt or raw.get("solution") is None:
        return None
    solution = parse_text(raw["solution"], where, "solution").strip()
    if "\\boxed" in solution:
        raise RowError(where, "solution", "holds a derivation", "put its final answer into a field 'answer'")
    return solution.removeprefix("<answer>").removesuffix("</answer>").strip()


def is_regions(answer: Any) -> bool:
    """Return whether an answer may be boxes or points: an object, or a list of objects, numbers or lists."""
    if isinstance(answer, Mapping):
        return True
    if not _is_list(answer) or not answer:
        return False
    return all(_is_number(item) or _is_list(item) or isinstance(item, Mapping) for item in answer)


def is_structured(answer: str) -> bool:
    """Return whether an answer is JSON or has marks of boxes, as references of perception have."""
    return answer.startswith(("[", "{", '"', "<"))


def _names_option(answer: str, options: Sequence[str]) -> bool:
    """Return whether an answer is an option's text or its letter, in forms such as B, b, (B) and [B]."""
    if answer in {option.strip() for option in options}:
        return True
    letter = _OPTION_LETTER.fullmatch(answer)
    if letter is None:
        return False
    index = ord(letter[1].upper()) - ord("A")
    return index < len(options)


def option_letter(index: int) -> str:
    """Return the letter of option ``index``: A for 0."""
    return chr(ord("A") + index)


def parse_id(value: Any, where: str, field: str) -> str:
    """Return the id of a row as text; of a row without one, the name of its file and its place there."""
    if value is None:
        return Path(where).name
    return parse_text(value, where, field)


def _is_list(value: Any) -> bool:
    # A text is a sequence, too.
    if isinstance(value, (str, bytes)):
        return False
    return isinstance(value, Sequence)


def _is_number(value: Any) -> bool:
    # A bool is an int, too.
    if isinstance(value, bool):
        return False
    return isinstance(value, (int, float))


def parse_text(value: Any, where: str, field: str) -> str:
    """Return a text, or a number as text; raise `RowError` for anything else."""
    if isinstance(value, str):
        return value
    if _is_number(value):
        return str(value)
    raise RowError(where, field, f"is {_describe(value)}", "give a text")


def _parse_number(value: Any, where: str, field: str) -> float | None:
    if value is None:
        return None
    # Python's JSON reader takes NaN and Infinity as numbers.
    if _is_number(value) and math.isfinite(value):
        return float(value)
    raise RowError(where, field, f"is {_describe(value)}", "give a number")


def _describe(value: Any) -> str:
    """Say in an error what a value is: missing, empty, or its type and its beginning."""
    if value is None:
        return "missing"
    if value == "" or value == []:
        return "empty"
    beginning = str(value)[:60]
    return f"{type(value).__name__} {beginning!r}"
