"""Rows from and to JSON."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ovr_megatron.data.row_json import row_to_json
from ovr_megatron.data.row_parsing import parse_row
from ovr_megatron.data.schema import ImagePart, Row, RowError, TextPart, VideoPart
from ovr_megatron.rewards.choice import right_option

ROOT = Path("/data/images")
USER = {"role": "user", "content": "2+3?"}
PROMPT: dict[str, Any] = {"messages": [USER], "answer": "5"}


def parse(raw: Any, root: Path = ROOT) -> Row:
    return parse_row(raw, "rows.jsonl:7", root)


def asking(*content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}], "answer": "5"}


def test_every_field_arrives_where_it_belongs() -> None:
    row = parse(
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": "a/b.png"},
                        {"type": "text", "text": "What?"},
                        {"type": "video", "video": ["f0.png", "f1.png"], "fps": 4},
                    ],
                },
                {"role": "assistant", "content": "Red</think>\\boxed{A}"},
            ],
            "answer": "A",
            "options": ["red", 5],
            "source": "mine",
            "difficulty": 1,
            "id": 12,
        }
    )
    image, text, video = row.messages[1].parts
    assert isinstance(image, ImagePart) and image.path == ROOT / "a/b.png" and image.root == ROOT
    assert (image.where, image.field) == ("rows.jsonl:7", "messages[1].content[0].image")
    assert text == TextPart("What?")
    assert isinstance(video, VideoPart) and video.fps == 4.0
    assert [frame.path for frame in video.frames] == [ROOT / "f0.png", ROOT / "f1.png"]
    assert (row.answer, row.options, row.source, row.difficulty, row.id) == ("A", ("red", "5"), "mine", 1.0, "12")
    assert (row.is_prompt, row.response, len(row.prompt)) == (False, "Red</think>\\boxed{A}", 2)


def test_the_rows_of_the_documentation_are_rows() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/data.md").read_text()
    lines = page.split("```json\n")[1].split("```")[0].splitlines()
    rows = [parse(json.loads(line)) for line in lines]
    assert [row.is_prompt for row in rows] == [False, True, True, True, True]
    assert [[type(part) for part in row.messages[0].parts] for row in rows] == [
        [TextPart],
        [TextPart],
        [ImagePart, TextPart],
        [ImagePart, ImagePart, TextPart],
        [VideoPart, TextPart],
    ]


def test_a_prompt_row_has_no_response_and_its_line_as_id() -> None:
    row = parse(PROMPT)
    assert (row.is_prompt, row.response, row.prompt, row.id) == (True, None, row.messages, "rows.jsonl:7")


def test_null_is_the_same_as_missing() -> None:
    filled = {"type": "text", "text": "2+3?", "image": None, "video": None}
    nulls = {
        "messages": [{"role": "user", "content": [filled]}],
        "answer": 5,
        "options": None,
        "source": None,
        "id": None,
    }
    assert parse(nulls) == parse(PROMPT)


def test_a_supervised_row_needs_no_answer() -> None:
    assert parse({"messages": [USER, {"role": "assistant", "content": "5"}]}).answer is None


TEXT = st.text(min_size=1).filter(str.strip)
PARTS = st.lists(
    st.one_of(
        st.builds(lambda text: {"type": "text", "text": text}, TEXT),
        st.just({"type": "image", "image": "a.png"}),
        st.just({"type": "video", "video": ["a.png", "b.png"], "fps": 1.5}),
    ),
    min_size=1,
)


@given(TEXT | PARTS, TEXT, st.lists(TEXT, max_size=3), st.none() | st.floats(0, 1))
def test_json_and_back_is_the_same_row(
    content: Any, response: str, options: list[str], difficulty: float | None
) -> None:
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": response}]
    row = parse({"messages": turns, "options": options, "difficulty": difficulty, "source": "s", "id": "i"})
    assert parse(json.loads(json.dumps(row_to_json(row)))) == row


def test_a_picture_without_a_file_travels_inside_the_json() -> None:
    picture = Image.effect_noise((9, 5), 50).convert("RGB")
    row = parse(asking({"type": "image", "image": picture}, {"type": "text", "text": "What?"}))
    again = parse(json.loads(json.dumps(row_to_json(row))))
    part = again.messages[0].parts[0]
    assert isinstance(part, ImagePart) and part.data is not None and part.data.startswith(b"\x89PNG")
    assert parse(row_to_json(again)) == again


@pytest.mark.parametrize(
    ("raw", "field", "problem"),
    [
        ([1], "row", "list"),
        ({"answer": "5"}, "messages", "missing"),
        ({"messages": "hello", "answer": "5"}, "messages", "str 'hello'"),
        ({"messages": ["hello"], "answer": "5"}, "messages[0]", "str"),
        ({"messages": [{"role": "human", "content": "hi"}], "answer": "5"}, "messages[0].role", "'human'"),
        ({"messages": [{"role": "user"}], "answer": "5"}, "messages[0].content", "missing"),
        ({"messages": [{"role": "user", "content": " \n"}], "answer": "5"}, "messages[0].content", "empty"),
        ({"messages": [USER, USER], "answer": "5"}, "messages", "user, user"),
        ({"messages": [{"role": "assistant", "content": "5"}]}, "messages", "assistant"),
        ({"messages": [{"role": "system", "content": "5"}], "answer": "5"}, "messages", "system"),
        (asking({"type": "audio", "audio": "a.wav"}), "messages[0].content[0].type", "'audio'"),
        (asking("text"), "messages[0].content[0].type", "None"),
        (asking({"type": "text"}), "messages[0].content[0].text", "missing"),
        (asking({"type": "image", "image": ""}), "messages[0].content[0].image", "empty"),
        (asking({"type": "image", "image": "https://x.org/a.png"}), "messages[0].content[0].image", "URL"),
        (asking({"type": "image", "image": {"bytes": "%%%"}}), "messages[0].content[0].image", "base64"),
        (asking({"type": "video", "video": "a.mp4"}), "messages[0].content[0].video", "a.mp4"),
        (asking({"type": "video", "video": [5]}), "messages[0].content[0].video[0]", "int"),
        (asking({"type": "video", "video": ["a"], "fps": -1}), "messages[0].content[0].video.fps", "-1"),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}]},
            "messages[1].content",
            "assistant",
        ),
        ({"messages": [USER]}, "answer", "missing"),
        (PROMPT | {"answer": "  "}, "answer", "empty"),
        (PROMPT | {"answer": "x" * 513}, "answer", "513"),
        (PROMPT | {"answer": True}, "answer", "bool"),
        (PROMPT | {"answer": ["5"]}, "answer", "list"),
        (PROMPT | {"options": ["1", "2"]}, "answer", "'5'"),
        (PROMPT | {"options": ["1", "2"], "answer": "C"}, "answer", "'C'"),
        (PROMPT | {"options": ["1", "2"], "answer": "(c)"}, "answer", "'(c)'"),
        (PROMPT | {"options": ["1", "2"], "answer": "(A) or (B)"}, "answer", "'(A) or (B)'"),
        (PROMPT | {"options": "12"}, "options", "str"),
        (PROMPT | {"options": [None]}, "options[0]", "missing"),
        (PROMPT | {"difficulty": "hard"}, "difficulty", "hard"),
        (PROMPT | {"difficulty": float("nan")}, "difficulty", "nan"),
        (PROMPT | {"source": {}, "id": {}}, "id", "dict"),
    ],
)
def test_bad_rows_name_place_field_and_remedy(raw: Any, field: str, problem: str) -> None:
    with pytest.raises(RowError) as caught:
        parse(raw)
    error = caught.value
    assert error.field == field
    assert problem in error.problem
    assert str(error).startswith(f"rows.jsonl:7: {field}: ")
    assert str(error).endswith(f"; {error.remedy}") and len(error.remedy) > 10


@pytest.mark.parametrize(
    ("raw", "remedy"),
    [
        ({"messages": [{"from": "user", "value": "hi"}], "answer": "5"}, "is called 'conversations'"),
        ({"messages": [USER, {"role": "tool", "content": "5"}]}, "turns of tools cannot be learned"),
        ({"messages": [USER]}, "or for supervised fine-tuning the assistant's reply"),
    ],
)
def test_rows_of_other_forms_have_the_remedy_for_theirs(raw: Any, remedy: str) -> None:
    with pytest.raises(RowError) as caught:
        parse(raw)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("answer", ["A", "B", "1/2", " two ", "(B)", "b", "(a)", "B.", "[A]"])
def test_an_answer_is_the_letter_or_the_text_of_an_option(answer: str) -> None:
    row = parse(PROMPT | {"options": ["1/2", "two"], "answer": answer})
    assert row.answer == answer
    assert right_option(answer, row.options) == int("b" in answer.lower() or "two" in answer)  # so a grader means it


def test_an_error_survives_the_way_between_processes() -> None:
    error = RowError("a:1", "answer", "is missing", "add it")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "a:1: answer: is missing; add it"


def test_metadata_and_structured_answers_are_read_and_written_back():
    metadata = {"facts": ["a cat", "two dogs"], "size": {"width": 3, "share": 0.5, "none": None}}
    raw = {"messages": [{"role": "user", "content": "Where?"}], "answer": [{"bbox_2d": [1, 2, 3, 4]}] * 200}
    row = parse({**raw, "metadata": metadata})
    assert json.loads(row.answer) == raw["answer"] and len(row.answer) > 512
    assert row.metadata == metadata
    assert parse(json.loads(json.dumps(row_to_json(row)))) == row
    hash(row)
    for value in ("text", [1], {"a": float("nan")}, {"a": object()}):
        with pytest.raises(RowError, match=r"metadata: is .*; give an object of JSON values"):
            parse({**raw, "metadata": value})
    with pytest.raises(RowError, match="answer: has 600 characters"):
        parse({**raw, "answer": "x" * 600})
