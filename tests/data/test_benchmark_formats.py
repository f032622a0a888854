"""Benchmarks in the form in which they are published: one row of each, its fields as the data set's card has them."""

import base64
import io
from pathlib import Path

import PIL.Image
import pytest

from ovr_megatron.config import FORMATS
from ovr_megatron.data.benchmark_formats import BENCHMARK_READERS
from ovr_megatron.data.formats import _FORMATS, detect, find_reader
from ovr_megatron.data.schema import ImagePart, RowError

_buffer = io.BytesIO()
PIL.Image.new("RGB", (30, 30), "red").save(_buffer, "PNG")
EMBEDDED = {"bytes": base64.b64encode(_buffer.getvalue()).decode(), "path": None}
ROWS = {
    "math": {"problem": "1+1?", "solution": "..", "answer": "2", "subject": "Algebra", "level": 3, "unique_id": "t/1"},
    "gpqa": {
        "Question": "Which?",
        "Correct Answer": "iron\n",
        "Incorrect Answer 1": "gold",
        "Incorrect Answer 2": "lead",
        "Incorrect Answer 3": "tin",
        "Record ID": "rec1",
        "High-level domain": "Chemistry",
    },
    "mmlu": {"question": "Which?", "subject": "law", "choices": ["a", "b", "c", "d"], "answer": 2},
    "mmlu_pro": {
        "question_id": 70,
        "question": "Which?",
        "options": ["x", "y", "z", "N/A"],
        "answer": "B",
        "answer_index": 1,
        "cot_content": "",
        "category": "law",
        "src": "s",
    },
    "mathvista": {
        "pid": "1",
        "question": "How far?",
        "image": "images/1.jpg",
        "decoded_image": EMBEDDED,
        "choices": None,
        "unit": "m",
        "precision": 1.0,
        "answer": "1.2",
        "question_type": "free_form",
        "answer_type": "float",
        "metadata": {"task": "geometry problem solving"},
        "query": "..",
    },
    "mathverse": {
        "sample_index": "5",
        "problem_index": "1",
        "problem_version": "Vision Only",
        "question": "",
        "image": EMBEDDED,
        "answer": "(C)",
        "question_type": "multi-choice",
        "metadata": {},
    },
    "dynamath": {
        "id": "1",
        "question": "What is the period?",
        "image": "image/1.png",
        "decoded_image": EMBEDDED,
        "ground_truth": "2.0944",
        "answer_type": "float",
        "subject": "analytic geometry",
        "knowledge_level": "high school",
    },
    "wemath": {
        "ID": "2steps_1",
        "split": "testmini",
        "knowledge concept": "Length",
        "question": "OA = ( ) m, AB = ( ) m",
        "option": "A. 300, 400;B. 400, 300; C. 3000, 4.5; D. 1; E. No correct answer",
        "answer": "C",
        "image_path": EMBEDDED,
        "key": "2steps_multi",
        "question number": 1,
    },
    "logicvista": {"question": "Which two?", "answer": "B, D", "skill": ["inductive"], "image": EMBEDDED},
    "mmmu_pro": {
        "id": "test_Art_1",
        "question": "Which is older, <image 1> or <image 2>?",
        "options": "['<image 1>', \"the one in '<image 2>'\", 'neither']",
        "answer": "B",
        "image_1": EMBEDDED,
        "image_2": EMBEDDED,
        "image_3": None,
        "subject": "Art",
    },
}


def read(name, **changes):
    return find_reader(name)(ROWS[name] | changes, "set[0]", Path("/data"))


def shape(row):
    """The prompt, each picture a star."""
    (message,) = row.messages
    return "".join("*" if isinstance(part, ImagePart) else part.text for part in message.parts)


@pytest.mark.parametrize("name", list(BENCHMARK_READERS))
def test_the_form_is_recognised(name):
    assert detect(ROWS[name], "set[0]") == name
    assert set(FORMATS) == {"auto", *_FORMATS.rows}


BOX, LETTER = "Put your final answer in \\boxed{}.", "Put the letter of the right option in \\boxed{}."


@pytest.mark.parametrize(
    ("name", "prompt", "answer", "source", "id"),
    [
        ("math", f"1+1?\n{BOX}", "2", "Algebra", "t/1"),
        ("mmlu", f"Which?\n(A) a\n(B) b\n(C) c\n(D) d\n{LETTER}", "C", "law", "set[0]"),
        ("mmlu_pro", f"Which?\n(A) x\n(B) y\n(C) z\n{LETTER}", "B", "law", "70"),
        (
            "mathvista",
            "*How far?\nPut your final answer, a number with 1 decimal, in m, in \\boxed{}.",
            "1.2",
            "geometry problem solving",
            "1",
        ),
        ("mathverse", f"*Answer the question in the picture.\n{LETTER}", "C", "Vision Only", "5"),
        (
            "dynamath",
            "*What is the period?\nPut your final answer, a number with three decimals, in \\boxed{}.",
            "2.0944",
            "float",
            "1",
        ),
        (
            "wemath",
            "*OA = ( ) m, AB = ( ) m\n(A) 300, 400\n(B) 400, 300\n(C) 3000, 4.5\n(D) 1\n(E) No correct answer\n"
            + LETTER,
            "C",
            "2steps_multi",
            "2steps_1/2steps_multi",
        ),
        (
            "logicvista",
            "*Which two?\nPut the letter of the right option, or the letters of all right ones, in \\boxed{}.",
            "B, D",
            "inductive",
            "set[0]",
        ),
        (
            "mmmu_pro",
            f"Which is older, * or *?\n(A) *\n(B) the one in '*'\n(C) neither\n{LETTER}",
            "B",
            "standard",
            "test_Art_1",
        ),
    ],
)
def test_rows_as_they_are_asked(name, prompt, answer, source, id):
    row = read(name)
    assert (shape(row), row.answer, row.source, row.id) == (prompt, answer, source, id)
    assert row.is_prompt


def test_the_options_of_gpqa_are_shuffled_and_always_alike():
    rows = [read("gpqa", Question=f"Which of {number}?") for number in range(40)]
    assert all(row.options[ord(row.answer) - ord("A")] == "iron" for row in rows)
    assert {row.answer for row in rows} == set("ABCD")
    assert rows[0].options == read("gpqa", Question="Which of 0?").options
    assert set(rows[0].options) == {"iron", "gold", "lead", "tin"}


def test_other_kinds_of_a_benchmark():
    multiple = read("mathvista", choices=["yes", "no"], answer="no", answer_type="text", unit=None, precision=None)
    assert shape(multiple) == f"*How far?\n(A) yes\n(B) no\n{LETTER}" and multiple.answer == "no"
    whole = read("mathvista", answer="3", answer_type="integer", unit=None, precision=None)
    assert shape(whole).endswith("Put your final answer, an integer, in \\boxed{}.")
    free = read("mathverse", question_type="free-form", answer="4.4 m", question="How long?")
    assert (shape(free), free.answer) == (f"*How long?\n{BOX}", "4.4 m")
    choice = read("dynamath", answer_type="multiple choice", ground_truth="B", question="Even? Choices: (A) yes (B) no")
    assert shape(choice) == f"*Even? Choices: (A) yes (B) no\n{LETTER}"
    unknown = read("logicvista", answer="", question="")
    assert shape(unknown).startswith("*Answer the question in the picture.")
    for written in ("A. ①;B\uff0e②;C. ③", "A. 45° B. 60° ;C. 120°", "A. 1; C. 2"):
        odd = read("wemath", option=written)
        assert shape(odd) == f"*OA = ( ) m, AB = ( ) m\n{written}\n{LETTER}" and odd.options == ()
    nested = read("mmmu_pro", options="[['left', 'right']]")
    assert nested.options == ("left", "right")
    vision = read("mmmu_pro", image=EMBEDDED, question=None)
    assert shape(vision) == f"*Answer the question in the picture.\n{LETTER}" and vision.options == ()
    assert vision.source == "vision"
    text = read("mathvista", metadata="{'task': 'x'}")
    assert text.source == ""
    decoded = {"id": "1", "question": "?", "options": [], "answer": "6", "level": 2, "subject": "x"}
    assert detect(decoded | {"decoded_image": EMBEDDED}, "") == "mathvision"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("math", {"problem": " "}, r"set\[0\]: problem: is str ' '; give a text"),
        ("mmlu", {"answer": 4}, "answer: is 4, none of the 4 options"),
        ("mmlu_pro", {"answer": "D"}, "answer: 'D' is none of the 3 options"),
        ("mathverse", {"problem_version": None}, "problem_version: is missing"),
        ("dynamath", {"answer_type": None}, "answer_type: is missing"),
        ("mmmu_pro", {"options": "[1, __import__('os')]"}, "options: is str"),
        ("mmmu_pro", {"image_2": None}, "image_2: is missing"),
        ("mmmu_pro", {"image": EMBEDDED, "answer": "D"}, "answer: 'D' is none of the 3 options"),
        ("mathvista", {"decoded_image": None, "image": "https://x.org/1.png"}, "image: 'https.*is a URL"),
    ],
)
def test_rows_that_cannot_be_used_are_named(name, changes, message):
    with pytest.raises(RowError, match=message):
        read(name, **changes)


@pytest.mark.parametrize("name", list(BENCHMARK_READERS))
def test_what_is_no_object_is_refused(name):
    with pytest.raises(RowError, match=r"set\[0\]: is a list; give one object a row"):
        find_reader(name)(["a"], "set[0]", Path("/data"))
