"""Letters of options, and answers that cannot be verified."""

import json
import string
from pathlib import Path

import pytest

from ovr_megatron.rewards.choice import named_letter, right_option, verifiable

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"


@pytest.mark.parametrize(
    "text",
    ["C", "c", "(C)", "C.", "C)", "[C]", "( C )", "Option C", "option (C)", "Answer: C", "The correct answer is C"],
)
def test_a_lone_letter_names_its_option(text):
    named = named_letter(text, 5)
    assert named is not None and (named.index, named.rest) == (2, "")


@pytest.mark.parametrize(
    ("text", "rest"), [("(C) 5", "5"), ("C: 5", "5"), ("C. 5", "5"), ("C) a square", "a square"), ("[C] 5", "5")]
)
def test_a_letter_may_be_followed_by_content(text, rest):
    named = named_letter(text, 5)
    assert named is not None and (named.index, named.rest, named.strong, named.hedged) == (2, rest, True, False)


@pytest.mark.parametrize("text", ["(A), (B)", "(A) or (B)", "(A) and B", "(A) 5 (B) 6", "(A)(B)", "(A)/(B)", "A: B"])
def test_several_letters_are_a_hedge(text):
    named = named_letter(text, 5)
    assert named is not None and named.hedged


@pytest.mark.parametrize("text", ["F", "(F)", "5", "cat", "", "ABC"])
def test_no_letter_within_range(text):
    assert named_letter(text, 5) is None


@pytest.mark.parametrize(
    ("answer", "options", "index"),
    [
        ("B", ["red", "blue"], 1),
        ("(B)", ["red", "blue"], 1),
        ("\\text{B}", ["red", "blue"], 1),
        ("blue", ["red", "blue"], 1),
        ("B. blue", ["red", "blue"], 1),
        ("4", ["4.0", "8"], 0),
        ("8", ["$8 \\mathrm{~m}$", "9 m"], 0),
        ("a", ["b", "a"], 1),
        ("A", ["B", "A"], 0),
        ("C", ["red", "blue"], None),
        ("7", ["4", "8"], None),
    ],
)
def test_right_option(answer, options, index):
    assert right_option(answer, options) == index


@pytest.mark.parametrize(
    ("answer", "options", "why"),
    [
        ("", (), "empty"),
        (" $ $ ", (), "empty"),
        ("Proof. Let x be even. Then the claim follows.", (), "proof"),
        ("x" * 500, (), "characters"),
        ("x" * 100_000, (), "characters"),
        ("Answers will vary.", (), "one value"),
        ("because the triangle has two equal sides its base angles are the same size too", (), "prose"),
        ("G", ("red", "blue"), "2 options"),
        ("green", ("red", "blue"), "2 options"),
    ],
)
def test_answers_without_a_verifiable_form(answer, options, why):
    reason = verifiable(answer, options)
    assert reason is not None and why in reason


@pytest.mark.parametrize("answer", ["5", "\\frac{14}{3}", "\\text{Evelyn}", "(2,12) \\cup (12,102)", "y = 2x + 3", "C"])
def test_answers_with_a_verifiable_form(answer):
    assert verifiable(answer) is None


def test_every_reference_of_the_real_sets_is_verifiable():
    if not SHARED.is_dir():
        pytest.skip(f"no shared data at {SHARED}")
    pairs: list[tuple[str, tuple[str, ...]]] = [
        (row["final_answer"], ()) for file in SHARED.glob("text/*.json") for row in json.loads(file.read_text("utf-8"))
    ]
    for file in [SHARED / "mathvision/testmini.jsonl", *SHARED.glob("puzzlevqa/*.jsonl")]:
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        pairs += [(str(row["answer"]), tuple(map(str, row["options"]))) for row in rows]
    assert len(pairs) > 1000
    assert [(answer, options, why) for answer, options in pairs if (why := verifiable(answer, options))] == []
    for answer, options in pairs:
        if options and answer in string.ascii_uppercase:
            assert right_option(answer, options) == string.ascii_uppercase.index(answer)
