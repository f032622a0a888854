"""Readers of the files that others publish: one function per format, from a decoded object to a `Row`.

Each takes ``(raw, where, image_root)`` as `ovr_megatron.data.row_parsing.parse_row` does, which is the reader
of our own form, and raises `RowError` naming the field of the file, not of our schema.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ovr_megatron.config import FORMATS
from ovr_megatron.data.benchmark_formats import BENCHMARK_READERS
from ovr_megatron.data.chat_formats import read_alpaca, read_llava, read_query, read_verl
from ovr_megatron.data.media import (
    IMAGE_COLUMNS,
    VIDEO_COLUMNS,
    ColumnMedia,
    parse_columns,
    place_media,
    refuse_marks,
    refuse_unread,
)
from ovr_megatron.data.questions import field_of, options_of, prompt_row, texts
from ovr_megatron.data.row_functions import RowFunction, row_function
from ovr_megatron.data.row_parsing import option_letter, parse_image, parse_row, parse_text
from ovr_megatron.data.schema import Message, Row, RowError, TextPart
from ovr_megatron.data.traces import END_OF_THOUGHT, with_thought
from ovr_megatron.runtime.registry import Registry

Reader = Callable[[Any, str, Path], Row]

_MARKER = re.compile(r"<image\d+>")


def read_orz(raw: Any, where: str, image_root: Path) -> Row:
    """Read one problem of Open-Reasoner-Zero.

    Its evaluation files have ``{"prompt": [{"from", "value"}], "final_answer"}``, its training files
    ``[{"from": "human", "value"}, {"from": "assistant", "ground_truth": {"value"}}]``, which a data set
    library turns into columns ``"0"`` and ``"1"``.
    """
    if isinstance(raw, Mapping) and "0" in raw:
        raw = [raw["0"], raw.get("1")]
    turn = None
    answer = None
    if isinstance(raw, Mapping):
        answer_field = "final_answer"
        answer = raw.get("final_answer")
        prompt = raw.get("prompt")
        if isinstance(prompt, Sequence) and len(prompt) == 1:
            turn = prompt[0]
    else:
        answer_field = "ground_truth.value"
        if isinstance(raw, Sequence) and len(raw) == 2:
            turn, reply = raw
            answer = _value_of(_value_of(reply, "ground_truth"), "value")
    question = _value_of(turn, "value")
    if not isinstance(question, str) or not question.strip():
        raise RowError(where, "prompt", "has no question", "give exactly one turn {'from': 'user', 'value': text}")
    if answer is None:
        raise RowError(where, answer_field, "is missing", "give the final answer or remove the row")
    return prompt_row((TextPart(question),), answer, (), where)


def _value_of(value: Any, key: str) -> Any:
    """Return the field ``key`` of an object; None of anything else."""
    if isinstance(value, Mapping):
        return value.get(key)
    return None


def read_mathvision(raw: Any, where: str, image_root: Path) -> Row:
    """Read one MathVision problem: ``id``, ``question``, ``options``, ``answer``, ``image``, ``level`` 1 to 5.

    All pictures of a problem are in one file.  A single ``<image1>`` says where it stands in the text; with
    several, which then name places inside the picture, the picture comes first and the names stay.
    """
    question = field_of(raw, "question", where)
    key = "decoded_image" if raw.get("decoded_image") is not None else "image"
    picture = field_of(raw, key, where)
    image = parse_image(picture, where, key, image_root)
    pieces = _MARKER.split(question)
    if len(pieces) == 2:
        before, after = pieces
        parts = (*texts(before), image, *texts(after))
    else:
        parts = (image, TextPart(question))
    level = raw.get("level")
    difficulty = None
    if isinstance(level, (int, float)):
        difficulty = float(level) / 5
    return prompt_row(
        parts,
        field_of(raw, "answer", where),
        options_of(raw, where),
        where,
        id=str(raw.get("id") or ""),
        difficulty=difficulty,
    )


def read_puzzlevqa(raw: Any, where: str, image_root: Path) -> Row:
    """Read one PuzzleVQA problem: ``image``, ``question``, ``options``, and as ``answer`` the content of one option."""
    image = parse_image(field_of(raw, "image", where), where, "image", image_root)
    field_of(raw, "options", where)
    options = options_of(raw, where)
    answer = parse_text(field_of(raw, "answer", where), where, "answer")
    if answer not in options:
        remedy = f"give one of {', '.join(options)}"
        raise RowError(where, "answer", f"{answer!r} is none of the options", remedy)
    question = TextPart(field_of(raw, "question", where))
    letter = option_letter(options.index(answer))
    return prompt_row((image, question), letter, options, where)


@dataclass(frozen=True)
class Format:
    """One published form of rows.

    Attributes:
        read: From a decoded object to a row.
        text: The field with the question or the chat, which errors name.
        media: The media columns that ``read`` places itself.  Where there are none, `read_row` places those of
            `ovr_megatron.data.media`.
        function: Is called first; what it returns is read in place of the object.
    """

    read: Reader
    text: str = "question"
    media: frozenset[str] = frozenset()
    function: RowFunction | None = None


def _as_format(value: Any) -> Format | None:
    """Return the format that an object of the user's stands for: a `Format`, or a function from a row to a chat."""
    if isinstance(value, Format):
        return value
    function = row_function(value)
    if function is None:
        return None
    return Format(parse_row, "messages", function=function)


_PICTURES = frozenset({"image", "decoded_image"})
_FORMATS = Registry[Format](
    "data.sources[].format",
    {
        "messages": Format(parse_row, "messages"),
        "orz": Format(read_orz, "prompt"),
        "verl": Format(read_verl, "prompt"),
        "llava": Format(read_llava, "conversations"),
        "alpaca": Format(read_alpaca, "instruction"),
        "query": Format(read_query, "query"),
        "mathvision": Format(read_mathvision, media=_PICTURES),
        "puzzlevqa": Format(read_puzzlevqa, media=_PICTURES),
        "math": Format(BENCHMARK_READERS["math"], "problem"),
        "gpqa": Format(BENCHMARK_READERS["gpqa"], "Question"),
        "mmlu": Format(BENCHMARK_READERS["mmlu"]),
        "mmlu_pro": Format(BENCHMARK_READERS["mmlu_pro"]),
        "mathvista": Format(BENCHMARK_READERS["mathvista"], media=_PICTURES),
        "mathverse": Format(BENCHMARK_READERS["mathverse"], media=_PICTURES),
        "dynamath": Format(BENCHMARK_READERS["dynamath"], media=_PICTURES),
        "wemath": Format(BENCHMARK_READERS["wemath"], media=_PICTURES | {"image_path"}),
        "logicvista": Format(BENCHMARK_READERS["logicvista"], media=_PICTURES | {"imagename"}),
        "mmmu_pro": Format(BENCHMARK_READERS["mmmu_pro"], media=_PICTURES | {f"image_{i}" for i in range(1, 8)}),
    },
    _as_format,
    "a Format, or a function that takes a row and returns its chat",
)
_LISTS = ("messages", "prompt", "completion", "conversations")  # of turns
_READ_IN_TURNS = ("content", "value", "role", "from", "reasoning_content")
_UNREAD_IN_TURNS = ("tools", "tool_calls", "function_call", "functions", "reasoning", "thinking", "thought", "system")


def read_row(form: Format, raw: Any, where: str, image_root: Path) -> Row:
    """Read one decoded object: its chat or question, and the media, system message and thought of its columns.

    Raises:
        RowError: the row cannot be used; a column with a medium, a mark of a medium or a part of the chat is not read.
    """
    if form.function is None:
        return _read_fields(form, raw, where, image_root)
    chat = form.function(raw, where)
    try:
        return _read_fields(form, chat, where, image_root)
    except RowError as error:
        raise form.function.name_in(error) from error


def _read_fields(form: Format, raw: Any, where: str, image_root: Path) -> Row:
    """Read the object of a file, or the one that the user's function returned; see `read_row`."""
    fields = raw if isinstance(raw, Mapping) else {}
    read_columns = form.media or {*IMAGE_COLUMNS, *VIDEO_COLUMNS}
    refuse_unread(fields, read_columns, where)
    _refuse_unread_chat(fields, raw, form, where)
    row = form.read(raw, where, image_root)
    media = ColumnMedia()
    if not form.media:
        media = parse_columns(fields, where, image_root)
    messages = place_media(row.messages, media, where, form.text)
    refuse_marks(messages, where, form.text)
    return replace(row, messages=_with_columns(messages, fields, where))


def _refuse_unread_chat(
    fields: Mapping[str, Any],
    raw: Any,
    form: Format,
    where: str,
) -> None:
    """Raise `RowError` for tools, a history that the format does not read, and media or thoughts inside turns."""
    unread_columns = ["tools", "functions"]
    if form.read not in (read_alpaca, read_query):
        unread_columns.append("history")
    for name in unread_columns:
        value = fields.get(name)
        # Some sets write an empty list, or its text, into every row.
        is_filled = isinstance(value, Sequence) and len(value) > 0
        if is_filled and value != "[]":
            raise RowError(where, name, "is not read", "remove the row, or the field if the chat does without it")
    for name in _LISTS:
        _refuse_unread_turns(fields.get(name), name, where)
    _refuse_unread_turns(raw, "", where)  # a row of Open-Reasoner-Zero may itself be a list of turns


def _refuse_unread_turns(turns: Any, name: str, where: str) -> None:
    """Raise `RowError` for media, tools or thoughts in fields of a turn that no format reads."""
    if not isinstance(turns, (list, tuple)):
        return
    for i, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            continue
        prefix = f"{name}[{i}]."
        refuse_unread(turn, _READ_IN_TURNS, where, prefix)
        for unread in filter(turn.get, _UNREAD_IN_TURNS):
            remedy = "write a thought as 'reasoning_content', or remove the row"
            raise RowError(where, prefix + unread, "is not read", remedy)


def _with_columns(
    messages: tuple[Message, ...],
    fields: Mapping[str, Any],
    where: str,
) -> tuple[Message, ...]:
    """Return the chat with the system message and the thought of its reply that stand in columns beside it."""
    system = fields.get("system")
    thought = fields.get("reasoning_content")
    if isinstance(system, str) and system.strip():
        if messages[0].role != "system":
            first = Message("system", (TextPart(system),))
            messages = (first, *messages)
        elif messages[0].text != system:
            raise RowError(where, "system", "stands beside a chat with another system message", "remove one of the two")
    last = messages[-1]
    if last.role != "assistant":
        return messages
    if not isinstance(thought, str) or not thought.strip():
        return messages
    if END_OF_THOUGHT in last.text:
        problem = "stands beside a reply that has a thought of its own"
        raise RowError(where, "reasoning_content", problem, "remove one of the two")
    trace = with_thought(thought, last.text)
    reply = replace(last, parts=(TextPart(trace),))
    return (*messages[:-1], reply)


_SIGNS = {  # fields that a format is detected by; the first match counts, so the more specific ones come first
    "mathvista": {"pid", "question", "answer_type"},
    "mathverse": {"problem_version"},
    "dynamath": {"question", "answer_type"},
    "mathvision": {"question", "answer", "level"},
    "wemath": {"knowledge concept", "option"},
    "gpqa": {"Question", "Correct Answer"},
    "mmlu": {"question", "choices", "subject"},
    "mmlu_pro": {"question", "options", "answer_index"},
    "logicvista": {"question", "answer", "skill"},
    "mmmu_pro": {"options", "answer", "subject", "id"},
    "math": {"problem", "answer"},
    "puzzlevqa": {"question", "answer", "options"},
    "alpaca": {"instruction", "output"},
    "query": {"query", "response"},
}


def register_format(name: str, form: Format, signs: Collection[str] = ()) -> None:
    """Let ``data.sources[].format`` take ``name``, before the settings are built.

    Args:
        name: Of the format.
        form: How its rows are read.
        signs: Fields by which ``auto`` detects it, after all built-in formats; none: it must be named.

    Raises:
        RegistryError: The name is taken.
    """
    _FORMATS.register(name, form)
    FORMATS.append(name)
    if signs:
        _SIGNS[name] = set(signs)


def find_reader(name: str) -> Reader:
    """Return the reader of a format: one of the table, or of a `Format` or function at ``package.module:NAME``.

    Raises:
        RegistryError: There is none.
    """
    return partial(read_row, _FORMATS.look_up(name))


_ANSWERS = {"reward_model", "data_source", "response", "completion", "answer", "solution"}


def detect(raw: Any, where: str) -> str:
    """Return the name of the format that the fields of a decoded row are of.

    Rows of several formats have a prompt and an answer, so the order of these tests matters.

    Raises:
        RowError: they are of no known format.
    """
    keys = set(raw) if isinstance(raw, Mapping) else set()
    if "messages" in keys:
        return "messages"
    if "conversations" in keys:
        return "llava"
    if "prompt" in keys and keys & _ANSWERS and "final_answer" not in keys:
        return "verl"
    if {"prompt", "final_answer"} <= keys or {"0", "1"} <= keys:
        return "orz"
    if isinstance(raw, list):
        return "orz"
    for name, signs in _SIGNS.items():
        if signs <= keys:
            return name
    fields = ", ".join(sorted(keys)) or "(none)"
    formats = ", ".join(_FORMATS.rows)
    remedy = f"give rows with 'messages', or set the format of the source to one of {formats}"
    raise RowError(where, "row", f"has only the fields {fields}", remedy)
