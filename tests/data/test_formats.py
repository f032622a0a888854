"""The forms of Open-Reasoner-Zero, MathVision and PuzzleVQA."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ovr_megatron.config import FORMATS, ConfigError, SourceConfig
from ovr_megatron.config import data as config_data
from ovr_megatron.data import formats
from ovr_megatron.data.formats import detect, read_mathvision, read_orz, read_puzzlevqa
from ovr_megatron.data.questions import prompt_row
from ovr_megatron.data.schema import ImagePart, Row, RowError, TextPart
from ovr_megatron.data.sources import open_source
from ovr_megatron.runtime.registry import RegistryError

ROOT = Path("/data")
ORZ = {"prompt": [{"from": "user", "value": "1+1?"}], "final_answer": "2"}
ORZ_TRAIN = [{"from": "human", "value": "1+1?"}, {"from": "assistant", "ground_truth": {"value": "2"}}]
ORZ_HUB = {"0": ORZ_TRAIN[0], "1": ORZ_TRAIN[1]}
VISION = {
    "id": "4",
    "question": "Which daisy?\n<image1>",
    "options": [],
    "answer": "6",
    "level": 2,
    "image": "images/4.jpg",
}
PUZZLE = {"image": "a.png", "question": "What number?", "options": [6, "3", 4], "answer": "4"}


def shape(row: Row) -> list[str]:
    """The parts of the prompt: the path of an image, or the text."""
    (message,) = row.messages
    return [str(part.path) if isinstance(part, ImagePart) else part.text for part in message.parts]  # type: ignore[union-attr]


@pytest.mark.parametrize("raw", [ORZ, ORZ_TRAIN, ORZ_HUB], ids=["evaluation", "training", "columns"])
def test_the_forms_of_orz_read_alike(raw: Any) -> None:
    row = read_orz(raw, "f.json[3]", ROOT)
    assert detect(raw, "") == "orz"
    assert shape(row) == ["1+1?\nPut your final answer in \\boxed{}."]
    assert (row.answer, row.options, row.id, row.is_prompt) == ("2", (), "f.json[3]", True)


def test_mathvision_puts_the_picture_where_the_question_names_it() -> None:
    row = read_mathvision(VISION, "f:1", ROOT)
    assert detect(VISION, "") == "mathvision"
    assert shape(row) == ["Which daisy?\n", "/data/images/4.jpg", "\nPut your final answer in \\boxed{}."]
    assert (row.answer, row.id, row.difficulty) == ("6", "4", 0.4)
    first = read_mathvision(VISION | {"question": "<image1>\nWhich?"}, "f:1", ROOT)
    assert shape(first) == ["/data/images/4.jpg", "\nWhich?\nPut your final answer in \\boxed{}."]


def test_mathvision_keeps_the_names_of_places_inside_the_picture() -> None:
    row = read_mathvision(VISION | {"question": "From <image1> to <image2>?"}, "f:1", ROOT)
    assert shape(row) == ["/data/images/4.jpg", "From <image1> to <image2>?\nPut your final answer in \\boxed{}."]


def test_options_are_listed_unless_they_stand_in_the_picture() -> None:
    row = read_mathvision(VISION | {"options": ["A", "$2$", "C or D"], "answer": "C"}, "f:1", ROOT)
    assert shape(row)[-1] == "\n(A)\n(B) $2$\n(C) C or D\nPut the letter of the right option in \\boxed{}."
    assert (row.options, row.answer) == (("A", "$2$", "C or D"), "C")


def test_puzzlevqa_answers_with_the_letter() -> None:
    row = read_puzzlevqa(PUZZLE, "f:1", ROOT)
    assert detect(PUZZLE, "") == "puzzlevqa"
    assert (row.answer, row.options) == ("C", ("6", "3", "4"))
    assert shape(row) == [
        "/data/a.png",
        "What number?\n(A) 6\n(B) 3\n(C) 4\nPut the letter of the right option in \\boxed{}.",
    ]
    assert read_puzzlevqa(PUZZLE | {"answer": 6}, "f:1", ROOT).answer == "A"


@pytest.mark.parametrize(
    ("reader", "raw", "field"),
    [
        (read_orz, {"prompt": [], "final_answer": "2"}, "prompt"),
        (read_orz, {"prompt": ORZ["prompt"]}, "final_answer"),
        (read_orz, [ORZ_TRAIN[0], {"from": "assistant", "value": "2"}], "ground_truth.value"),
        (read_orz, [ORZ_TRAIN[0]], "prompt"),
        (read_orz, "text", "prompt"),
        (read_orz, ORZ | {"final_answer": ""}, "answer"),
        (read_orz, ORZ | {"final_answer": ["2"]}, "answer"),
        (read_orz, {"prompt": [{"from": "user", "value": " "}], "final_answer": "2"}, "prompt"),
        (read_mathvision, VISION | {"question": None}, "question"),
        (read_mathvision, VISION | {"question": 5}, "question"),
        (read_mathvision, VISION | {"image": None}, "image"),
        (read_mathvision, VISION | {"image": 5}, "image"),
        (read_mathvision, VISION | {"options": ["1", "2"]}, "answer"),
        (read_mathvision, VISION | {"question": " "}, "question"),
        (read_mathvision, VISION | {"answer": {"value": "6"}}, "answer"),
        (read_mathvision, VISION | {"options": 7}, "options"),
        (read_mathvision, VISION | {"options": ["6", None]}, "options[1]"),
        (read_puzzlevqa, PUZZLE | {"options": None}, "options"),
        (read_puzzlevqa, PUZZLE | {"options": "634"}, "options"),
        (read_puzzlevqa, PUZZLE | {"answer": "9"}, "answer"),
        (read_puzzlevqa, ["text"], "image"),
    ],
)
def test_a_bad_problem_names_the_field_of_its_file(reader: Any, raw: Any, field: str) -> None:
    with pytest.raises(RowError) as caught:
        reader(raw, "file.jsonl:8", ROOT)
    assert (caught.value.where, caught.value.field) == ("file.jsonl:8", field)


def test_an_unknown_form_is_listed_with_its_fields() -> None:
    known = "messages, orz, verl, llava, alpaca, query, mathvision, puzzlevqa"
    with pytest.raises(RowError, match=rf"f:1: row: has only the fields a, b; .*{known}"):
        detect({"b": 1, "a": 2}, "f:1")


def test_text_parts_are_never_empty() -> None:
    parts = read_mathvision(VISION, "f:1", ROOT).messages[0].parts
    assert all(part.text.strip() for part in parts if isinstance(part, TextPart))


@pytest.fixture
def tables_of_this_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_FORMATS", replace(formats._FORMATS, rows=dict(formats._FORMATS.rows)))
    monkeypatch.setattr(formats, "_SIGNS", dict(formats._SIGNS))
    names = list(FORMATS)
    monkeypatch.setattr(formats, "FORMATS", names)
    monkeypatch.setattr(config_data, "FORMATS", names)


def read_riddle(raw: Any, where: str, image_root: Path) -> Row:
    return prompt_row((TextPart(raw["riddle"]),), raw["solved"], (), where)


RIDDLE = formats.Format(read_riddle, "riddle")


def answers(path: Path, form: str) -> list[str | None]:
    rows = open_source(SourceConfig(path=str(path), format=form))
    return [rows[i].answer for i in range(len(rows))]


@pytest.mark.usefixtures("tables_of_this_test")
def test_a_format_from_outside_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"riddle": "What has keys?", "solved": "a piano"}\n')
    with pytest.raises(RowError, match="has only the fields riddle, solved"):
        answers(file, "auto")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))  # as PYTHONPATH
    assert answers(file, "test_formats:RIDDLE") == ["a piano"]
    with pytest.raises(ConfigError, match="format='riddle' is not known"):
        answers(file, "riddle")
    formats.register_format("riddle", RIDDLE, {"riddle", "solved"})
    assert answers(file, "riddle") == answers(file, "auto") == ["a piano"]
    with pytest.raises(RegistryError, match="'riddle' is registered already"):
        formats.register_format("riddle", RIDDLE)
    with pytest.raises(RegistryError, match="is of type function; make it a Format"):
        answers(file, "test_formats:read_riddle")
