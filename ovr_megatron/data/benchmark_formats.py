r"""Readers of the benchmarks that the paper reports, in the form in which they are published, one function for each.

Questions stand as their authors wrote them; the request at the end asks for ``\boxed{}``.  ``source`` is what a
benchmark groups its own scores by.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ovr_megatron.data.questions import field_of, options_of, prompt_row, require_text
from ovr_megatron.data.row_parsing import option_letter, parse_image, parse_text
from ovr_megatron.data.schema import LETTER_REQUEST, Part, Row, RowError, TextPart

Reader = Callable[[Any, str, Path], Row]

PICTURED = "Answer the question in the picture."
_WE_MATH_OPTION = re.compile(r"(?:^|;)\s*([A-H])\.")
_MMMU_MARK = re.compile(r"<image (\d)>")


def read_math(raw: Any, where: str, image_root: Path) -> Row:
    """Read MATH500 or AIME: ``problem``, ``answer``; ``subject`` and ``level`` (1 to 5) of MATH500."""
    level = raw.get("level")
    return prompt_row(
        (TextPart(_text(raw, "problem", where)),),
        field_of(raw, "answer", where),
        (),
        where,
        id=_id(raw, "unique_id", "id"),
        source=str(raw.get("subject") or ""),
        difficulty=level / 5 if isinstance(level, int) else None,
    )


def read_gpqa(raw: Any, where: str, image_root: Path) -> Row:
    """Read GPQA: one right and three wrong answers; their order is drawn from the question, always the same."""
    question = _text(raw, "Question", where)
    options = []
    for field in ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"):
        option = _text(raw, field, where)
        options.append(option.strip())
    # Seeded by the text as published: other seeds would shuffle the options of every question anew.
    order = random.Random(question).sample(range(4), 4)
    return prompt_row(
        (TextPart(question.strip()),),
        option_letter(order.index(0)),
        [options[index] for index in order],
        where,
        id=_id(raw, "Record ID"),
        source=str(raw.get("High-level domain") or ""),
    )


def read_mmlu(raw: Any, where: str, image_root: Path) -> Row:
    """Read MMLU: ``question``, ``choices``, ``answer`` (number from 0), ``subject``; ScienceQA's ``hint`` before it."""
    options = options_of(raw, where, "choices")
    hint = parse_text(raw.get("hint") or "", where, "hint")
    question = field_of(raw, "question", where)
    if hint.strip():
        question = f"{hint.strip()}\n{question}"
    return prompt_row(
        (TextPart(question),),
        _letter(raw, "answer", len(options), where),
        options,
        where,
        source=str(raw.get("subject") or ""),
    )


def read_mmlu_pro(raw: Any, where: str, image_root: Path) -> Row:
    """Read MMLU-Pro: as MMLU with three to ten ``options``, filled up with "N/A", and a letter as ``answer``."""
    options = [option for option in options_of(raw, where) if option != "N/A"]
    return prompt_row(
        (TextPart(field_of(raw, "question", where)),),
        field_of(raw, "answer", where),
        options,
        where,
        id=_id(raw, "question_id"),
        source=str(raw.get("category") or ""),
    )


def read_mathvista(raw: Any, where: str, image_root: Path) -> Row:
    """Read MathVista: ``choices`` or a number, rounded to ``precision`` decimals, maybe in a ``unit``."""
    options = options_of(raw, where, "choices")
    answer_type = raw.get("answer_type")
    unit = raw.get("unit")
    precision = raw.get("precision")
    request = None
    if not options:
        form = {"integer": "an integer", "list": "a list such as [1, 2, 3]"}.get(str(answer_type), "a number")
        if answer_type == "float" and precision is not None:
            decimals = "decimals" if precision > 1 else "decimal"
            form = f"a number with {int(precision)} {decimals}"
        if unit:
            form = f"{form}, in {unit}"
        request = f"Put your final answer, {form}, in \\boxed{{}}."
    metadata = raw.get("metadata")
    task = metadata.get("task") if isinstance(metadata, Mapping) else None
    return prompt_row(
        (_image(raw, where, image_root), TextPart(field_of(raw, "question", where))),
        field_of(raw, "answer", where),
        options,
        where,
        request=request,
        id=_id(raw, "pid"),
        source=str(task or ""),
    )


def read_mathverse(raw: Any, where: str, image_root: Path) -> Row:
    """Read MathVerse; ``problem_version`` is the source, of which "Vision Only" has its question in the picture."""
    question = str(raw.get("question") or "").strip()
    answer = parse_text(field_of(raw, "answer", where), where, "answer")
    answer = answer.strip()
    is_choice = raw.get("question_type") == "multi-choice"
    bare = answer.strip("()")
    if is_choice and len(bare) == 1:
        answer = bare
    return prompt_row(
        (_image(raw, where, image_root), TextPart(question or PICTURED)),
        answer,
        (),
        where,
        request=LETTER_REQUEST if is_choice else None,
        id=_id(raw, "sample_index"),
        source=str(field_of(raw, "problem_version", where)),
    )


def read_dynamath(raw: Any, where: str, image_root: Path) -> Row:
    """Read DynaMath: ten variants of each of 501 questions share its ``id``; ``answer_type`` is the source."""
    answer_field = "ground_truth" if "ground_truth" in raw else "answer"
    answer_type = str(field_of(raw, "answer_type", where))
    requests = {
        "float": "Put your final answer, a number with three decimals, in \\boxed{}.",
        "multiple choice": LETTER_REQUEST,  # the options are listed in the question
    }
    return prompt_row(
        (_image(raw, where, image_root), TextPart(field_of(raw, "question", where))),
        field_of(raw, answer_field, where),
        (),
        where,
        request=requests.get(answer_type),
        id=_id(raw, "id"),
        source=answer_type,
    )


def read_wemath(raw: Any, where: str, image_root: Path) -> Row:
    """Read We-Math: ``ID`` joins the steps of a problem, ``key`` says which step it is; both are in the row's id."""
    listing = field_of(raw, "option", where)
    marks = list(_WE_MATH_OPTION.finditer(listing))
    # An option ends where the mark of the next one begins.
    ends = [mark.start() for mark in marks[1:]]
    ends.append(len(listing))
    options = []
    for mark, end in zip(marks, ends, strict=True):
        option = listing[mark.end() : end]
        options.append(option.strip(" ;"))
    question = field_of(raw, "question", where)
    request = None
    letters = [mark[1] for mark in marks]
    expected_letters = [option_letter(i) for i in range(len(marks))]
    if not letters or letters != expected_letters:
        # A few list their options in another form: it stays as it is, behind the question.
        question = f"{question}\n{listing}"
        options = []
        request = LETTER_REQUEST
    key = field_of(raw, "key", where)
    return prompt_row(
        (_image(raw, where, image_root, "image_path"), TextPart(question)),
        field_of(raw, "answer", where),
        options,
        where,
        request=request,
        id=f"{field_of(raw, 'ID', where)}/{key}",
        source=str(key),
    )


def read_logicvista(raw: Any, where: str, image_root: Path) -> Row:
    """Read LogicVista: letters of options in the picture, several of them in some questions; one has no answer."""
    image_field = "image" if raw.get("image") is not None else "imagename"
    question = str(raw.get("question") or "").strip()
    answer = str(raw.get("answer") or "").strip()
    skill = raw.get("skill")
    if isinstance(skill, list) and skill:
        skill = skill[0]
    else:
        skill = skill or ""
    return prompt_row(
        (_image(raw, where, image_root, image_field), TextPart(question or PICTURED)),
        answer or "no answer is known",
        (),
        where,
        request="Put the letter of the right option, or the letters of all right ones, in \\boxed{}.",
        source=str(skill),
    )


def read_mmmu_pro(raw: Any, where: str, image_root: Path) -> Row:
    """Read MMMU-Pro; the setting is the source.

    "standard": pictures where question and options name them; "vision": the whole question is a picture.
    """
    options = field_of(raw, "options", where)
    if isinstance(options, str):
        try:
            options = ast.literal_eval(options)
        except (ValueError, SyntaxError):
            pass  # `options_of` refuses the text
    if isinstance(options, list) and len(options) == 1:
        if isinstance(options[0], list):
            options = options[0]  # one question of the set has its options a level deeper
    options = options_of({"options": options}, where)
    answer = field_of(raw, "answer", where)
    row_id = _id(raw, "id")
    if raw.get("image") is not None:
        parts = (_image(raw, where, image_root), TextPart(PICTURED))
        row = prompt_row(
            parts,
            answer,
            (),
            where,
            request=LETTER_REQUEST,
            id=row_id,
            source="vision",
        )
        # The options are in the picture, so that `prompt_row` cannot compare the letter with them.
        letters = [option_letter(i) for i in range(len(options))]
        if str(answer) not in letters:
            problem = f"{answer!r} is none of the {len(options)} options"
            raise RowError(where, "answer", problem, "give a letter")
        return row
    question = field_of(raw, "question", where)
    text = " ".join([question, *options])
    pictures = {}
    for digit in dict.fromkeys(_MMMU_MARK.findall(text)):  # each picture once, in order
        field = f"image_{digit}"
        image = field_of(raw, field, where)
        pictures[f"<image {digit}>"] = parse_image(image, where, field, image_root)
    return prompt_row(
        (TextPart(question),),
        answer,
        options,
        where,
        pictures=pictures,
        id=row_id,
        source="standard",
    )


def _refuse_other_types(reader: Reader) -> Reader:
    """Return the reader with a check that the row is an object."""

    def read(raw: Any, where: str, image_root: Path) -> Row:
        if not isinstance(raw, Mapping):
            raise RowError(where, "", f"is a {type(raw).__name__}", "give one object a row")
        return reader(raw, where, image_root)

    return read


_READERS: dict[str, Reader] = {
    "math": read_math,
    "gpqa": read_gpqa,
    "mmlu": read_mmlu,
    "mmlu_pro": read_mmlu_pro,
    "mathvista": read_mathvista,
    "mathverse": read_mathverse,
    "dynamath": read_dynamath,
    "wemath": read_wemath,
    "logicvista": read_logicvista,
    "mmmu_pro": read_mmmu_pro,
}
BENCHMARK_READERS = {name: _refuse_other_types(reader) for name, reader in _READERS.items()}


def _text(raw: Mapping[str, Any], key: str, where: str) -> str:
    value: str = field_of(raw, key, where)
    require_text(value, where, key)
    return value


def _image(
    raw: Mapping[str, Any],
    where: str,
    root: Path,
    key: str = "image",
) -> Part:
    """Return the picture of a row: the one that ``datasets`` has decoded where there is one, else the file named."""
    for name in ("decoded_image", key, "image"):
        if raw.get(name) is not None:
            key = name
            break
    return parse_image(field_of(raw, key, where), where, key, root)


def _letter(raw: Mapping[str, Any], key: str, count: int, where: str) -> str:
    value = field_of(raw, key, where)
    if not isinstance(value, int) or not 0 <= value < count:
        problem = f"is {value!r}, none of the {count} options"
        raise RowError(where, key, problem, "give its number, from 0")
    return option_letter(value)


def _id(raw: Mapping[str, Any], *keys: str) -> str:
    for key in keys:
        value = raw.get(key)
        if value is not None:
            return str(value)
    return ""
