"""Readers of the files that others publish: one function per format, from a decoded object to a `Row`.

Each takes ``(raw, where, image_root)`` as `ovr_megatron.data.schema.parse_row` does, which is the reader
of our own form, and raises `RowError` naming the field of the file, not of our schema.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ovr_megatron.data.benchmark_formats import BENCHMARK_READERS
from ovr_megatron.data.chat_formats import read_llava, read_verl
from ovr_megatron.data.questions import field_of, options_of, prompt_row, texts
from ovr_megatron.data.schema import Row, RowError, TextPart, option_letter, parse_image, parse_row, parse_text

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
    if isinstance(raw, Mapping):
        prompt, answer, field = raw.get("prompt"), raw.get("final_answer"), "final_answer"
        asked = prompt[0] if isinstance(prompt, Sequence) and len(prompt) == 1 else None
    else:
        asked, told = raw if isinstance(raw, Sequence) and len(raw) == 2 else (None, None)
        truth = told.get("ground_truth") if isinstance(told, Mapping) else None
        answer, field = truth.get("value") if isinstance(truth, Mapping) else None, "ground_truth.value"
    question = asked.get("value") if isinstance(asked, Mapping) else None
    if not isinstance(question, str) or not question.strip():
        raise RowError(where, "prompt", "has no question", "give exactly one turn {'from': 'user', 'value': text}")
    if answer is None:
        raise RowError(where, field, "is missing", "give the final answer or remove the row")
    return prompt_row((TextPart(question),), answer, (), where)


def read_mathvision(raw: Any, where: str, image_root: Path) -> Row:
    """Read one MathVision problem: ``id``, ``question``, ``options``, ``answer``, ``image``, ``level`` 1 to 5.

    All pictures of a problem are in one file.  A single ``<image1>`` says where it stands in the text; with
    several, which then name places inside the picture, the picture comes first and the names stay.
    """
    question = field_of(raw, "question", where)
    key = "decoded_image" if raw.get("decoded_image") is not None else "image"
    image = parse_image(field_of(raw, key, where), where, key, image_root)
    before, *after = _MARKER.split(question)
    if len(after) == 1:
        parts = (*texts(before), image, *texts(after[0]))
    else:
        parts = (image, TextPart(question))
    level = raw.get("level")
    return prompt_row(
        parts,
        field_of(raw, "answer", where),
        options_of(raw, where),
        where,
        id=str(raw.get("id") or ""),
        difficulty=float(level) / 5 if isinstance(level, (int, float)) else None,
    )


def read_puzzlevqa(raw: Any, where: str, image_root: Path) -> Row:
    """Read one PuzzleVQA problem: ``image``, ``question``, ``options``, and as ``answer`` the content of one option."""
    image = parse_image(field_of(raw, "image", where), where, "image", image_root)
    field_of(raw, "options", where)
    options, answer = options_of(raw, where), parse_text(field_of(raw, "answer", where), where, "answer")
    if answer not in options:
        remedy = f"give one of {', '.join(options)}"
        raise RowError(where, "answer", f"{answer!r} is none of the options", remedy)
    question = TextPart(field_of(raw, "question", where))
    return prompt_row((image, question), option_letter(options.index(answer)), options, where)


READERS: dict[str, Reader] = {
    "messages": parse_row,
    "orz": read_orz,
    "verl": read_verl,
    "llava": read_llava,
    "mathvision": read_mathvision,
    "puzzlevqa": read_puzzlevqa,
    **BENCHMARK_READERS,
}


_SIGNS = {  # fields by which a row is known, the more telling ones first
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
}


def detect(raw: Any, where: str) -> str:
    """Return the name of the format of a decoded object, or raise `RowError` if it has none of them."""
    keys = set(raw) if isinstance(raw, Mapping) else set()
    if "messages" in keys:
        return "messages"
    if "conversations" in keys:
        return "llava"
    if "prompt" in keys and keys & {"reward_model", "data_source", "response"}:
        return "verl"
    if isinstance(raw, list) or {"prompt", "final_answer"} <= keys or {"0", "1"} <= keys:
        return "orz"
    if name := next((name for name, signs in _SIGNS.items() if signs <= keys), None):
        return name
    remedy = f"give rows with 'messages', or set the format of the source to one of {', '.join(READERS)}"
    raise RowError(where, "row", f"has only the fields {', '.join(sorted(keys)) or '(none)'}", remedy)
