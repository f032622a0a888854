"""Verdicts on hand-made cases, on properties, and on real references graded against themselves."""

import json
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovr_megatron.rewards.grader import grade
from ovr_megatron.rewards.latex import MAX_ANSWER
from ovr_megatron.rewards.verdict import RIGHT, GradeRequest, Reason

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
CASES = Path(__file__).parent / "cases"
LETTERS = tuple("ABCDE")
COLOURS = ("red", "blue", "green", "Yellow", "cannot be told")
LETTER_A = ("A", "(A)", "a", "A.", "\\text{A}", "\\textbf{(A)}", "Option A", "\uff08A\uff09")
LENGTHS = ("$8 \\mathrm{~m}$", "9 m", "10 m")
ORDERS = ("5-4-3-2-1", "5-2-3-4-1", "5-4-2-3-1", "5-3-2-1-4", "5-2-3-1-4")
NAMES = ("GDA", "ADG", "GAD", "GAG")


def verdict(box, answer, options=()):
    return grade(GradeRequest(f"I think \\boxed{{0}}, no: \\boxed{{{box}}}.", answer, tuple(options)))


@pytest.mark.parametrize(
    ("box", "answer", "options"),
    [
        *[(letter, "A", COLOURS) for letter in LETTER_A],
        *[(both, "A", COLOURS) for both in ("A: red", "(A) red", "A. red", "A red", "A - red", "\\text{(A)}\\ Red")],
        ("red", "A", COLOURS),
        ("A", "red", COLOURS),
        ("yellow", "D", COLOURS),
        ("E) \\text{ A square}", "E", LETTERS),
        ("(A)", "A", ("(A)", "(B)", "(C)")),
        ("C", "C", ()),
        ("\\text{(C)}", "C", ()),
        *[(length, "A", LENGTHS) for length in ("8", "8m", "8 meters", "8 \\mathrm{~m}", "800 cm", "\\frac{16}{2}")],
        ("2 \\cdot 4 \\cdot 3", "B", ("$2+4$", "$2 \\cdot 4 \\cdot 3$")),
        ("24", "B", ("$2+4$", "$2 \\cdot 4 \\cdot 3$")),
        ("8:5", "B", ("$1: 1$", "$8: 5$")),
        ("2 and 1", "B", ("1 and 3", "1 and 2")),
        ("\\frac{1}{2}", "A", ("$\\frac{1}{2}$ turn", "$\\frac{1}{3}$ turn")),
        ("x^2 - 2x + 1", "B", ("$x+1$", "$(x-1)^{2}$")),
    ],
)
def test_the_right_option_by_letter_or_content(box, answer, options):
    assert verdict(box, answer, options).correct


@pytest.mark.parametrize(
    ("box", "answer", "options", "reason"),
    [
        ("B", "A", COLOURS, Reason.OTHER_OPTION),
        ("blue", "A", COLOURS, Reason.OTHER_OPTION),
        ("(B) red", "A", COLOURS, Reason.CONTRADICTION),
        ("(A) blue", "A", COLOURS, Reason.CONTRADICTION),
        ("A or B", "A", COLOURS, Reason.DIFFERENT),
        ("A, B", "A", LETTERS, Reason.DIFFERENT),
        ("(A), (B)", "A", LETTERS, Reason.SEVERAL_OPTIONS),
        ("(A) and (B)", "B", LETTERS, Reason.SEVERAL_OPTIONS),
        ("(B)(A)", "B", LETTERS, Reason.SEVERAL_OPTIONS),
        ("ABCDE", "A", LETTERS, Reason.DIFFERENT),
        ("red or blue", "A", COLOURS, Reason.DIFFERENT),
        ("A square", "B", LETTERS, Reason.DIFFERENT),
        ("E) \\text{ A square}", "A", LETTERS, Reason.OTHER_OPTION),
        ("2", "A", ("2 red", "2 blue"), Reason.SEVERAL_OPTIONS),
        ("1", "A", ("1 cm", "1 m"), Reason.SEVERAL_OPTIONS),
        ("1 m", "A", ("1 cm", "1 m"), Reason.OTHER_OPTION),
        ("5-1-2-3-4", "E", ORDERS, Reason.SEVERAL_OPTIONS),  # all are -5 to a calculator
        ("5-4-3-2-1", "E", ORDERS, Reason.OTHER_OPTION),
        ("GAD", "D", NAMES, Reason.OTHER_OPTION),
        ("DGA", "A", NAMES, Reason.DIFFERENT),  # a product of the same letters
        ("(1) 20 cm", "B", ("20 cm", "21 cm"), Reason.DIFFERENT),  # a mixed number to the parser
    ],
)
def test_not_the_right_option(box, answer, options, reason):
    assert verdict(box, answer, options).reason is reason


@pytest.mark.parametrize(
    ("box", "answer"),
    [
        ("12\\text{ cm}", "12"), ("12", "12 cm"), ("12 cm^2", "12\\text{ cm}^2"), ("500 cm", "5 m"),
        ("20 m/s", "72 km/h"), ("864", "864 \\mbox{ inches}^2"), ("\\frac{270}{7}", "\\frac{270}7\\text{ degrees}"),
        ("21 jumps", "21"),
        ("13 times", "13"), ("3\\pi", "3 \\pi \\mathrm{cm}^{3}"), ("90", "90^\\circ"), ("90 degrees", "90^{\\circ}"),
        ("5", "5\\ \\mathrm{N}"), ("12 dollars", "\\$12"), ("\\$18.90", "18.9"), ("50\\%", "50"), ("0.5", "50\\%"),
        ("0.5", "\\frac12"), ("1/2", "\\dfrac{1}{2}"), ("\\frac 59", "\\frac{5}{9}"), ("1\\frac45", "\\frac{9}{5}"),
        ("-\\frac{1}{2}", "\\frac{-1}{2}"), ("0.333333", "1/3"), ("1,000", "1000"), ("10080", "10,\\!080"),
        ("(1,2]", "\\left(1,\\, 2\\right]"), ("(2,5)", "2<x<5"), ("2<x<5", "(2,5)"), ("[-2,7]", "x \\in [-2,7]"),
        ("(-\\infty, 3]", "x \\le 3"), ("(9,36) \\cup (0,9)", "(0,9) \\cup (9,36)"),
        ("x=5", "5"), ("5", "x=5"), ("y = 2x+3", "2x+3"), ("2+3=5", "5"), ("2,1", "1,2"), ("4 and 1", "1 and 4"),
        ("\\sqrt{20}", "2\\sqrt5"), ("2√5", "2\\sqrt{5}"), ("2\\sqrt{5} \\approx 4.47", "2\\sqrt{5}"),
        ("x^2+2x+1", "(x+1)^2"), ("cot(x)", "\\frac{1}{\\tan x}"), ("-5i+6", "6-5i"), ("3628800", "10!"),
        ("3+2\\sqrt2, 3-2\\sqrt2", "3 \\pm 2\\sqrt{2}"), ("6.72\\times10^{-5}", ".0000672"), ("52", "52_8"),
        ("\\begin{pmatrix}-\\frac13\\\\\\frac23\\end{pmatrix}", "\\begin{pmatrix} -1/3 \\\\ 2/3 \\end{pmatrix}"),
        ("Evelyn", "\\text{Evelyn}"), ("east", "\\text{East}"), ("\\boxed{7}", "7"), ("  7\n", "7"),
    ],
)  # fmt: skip
def test_notation_does_not_decide(box, answer):
    assert verdict(box, answer).correct


@pytest.mark.parametrize(
    ("box", "answer"),
    [
        ("12", "13"), ("5 cm", "5 m"), ("5%", "50\\%"), ("0.33", "1/3"), ("999999.0", "1000000"),
        ("0.1250001", "1/8"), ("\\sqrt{5} cm", "\\sqrt{5} m"), (".0000671", ".0000672"), ("35625", ".35625"),
        ("[1,2]", "(1,2)"), ("\\{1,2\\}", "(1,2)"), ("(2,1)", "(1,2)"), ("(1,234)", "1234"), ("x<3", "x \\le 3"),
        ("5 or 6", "5"), ("5, 6", "5"), ("1, 2, 3", "1, 2"), ("3", "3,3"), ("5 million", "5"), ("21 or more", "21"),
        ("y=5", "x=5"), ("52_7", "52_8"), ("seat", "east"), ("\\text{seat}", "\\text{east}"), ("X", "Y"),
        ("\\begin{pmatrix} 2 \\\\ 1 \\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
        ("-\\sqrt{5}", "\\sqrt{5}"),
        ("x^2+1", "(x+1)^2"), ("\\frac32", "V=\\frac{3}{2} W"), ("the answer is 5", "5"), ("5", "5m"),
        ("\\frac{1}{0}", "0"),
        ("1/0", "\\infty"), ("q-p", "p-q"), ("D", "C"), ("s^2-2", "s^2-2s"),
    ],
)  # fmt: skip
def test_another_value_is_wrong(box, answer):
    assert verdict(box, answer).reason is Reason.DIFFERENT


@pytest.mark.parametrize("name", ["forms", "tiny_numbers_extra", "tiny_numbers_rows", "spellings"])
def test_forms_of_answers_and_hedges(name):
    """Answers as models write them, and what must not earn a reward: alternatives, lists, ranges, other units."""
    rows = [json.loads(line) for line in (CASES / f"{name}.jsonl").read_text("utf-8").splitlines()]
    decided = [row for row in rows if "correct" in row]
    assert len(decided) >= 7
    wrong = [
        row
        for row in decided
        if grade(GradeRequest(row.get("response", f"So</think>\\boxed{{{row.get('box')}}}"), row["answer"])).correct
        != row["correct"]
    ]
    assert wrong == []


def test_small_numbers_are_told_apart_within_larger_forms():
    """math-verify rounds absolutely, to 6 digits after the point or 1e-15; a pair is no better than its entries."""
    for form in ("{}", "({}, 1)", "\\{{{}, 1\\}}", "x = {}", "\\begin{{pmatrix}} {} \\\\ 1 \\end{{pmatrix}}", "{}x"):
        for one, other in (("\\sqrt{2} \\times 10^{-19}", "\\sqrt{3} \\times 10^{-19}"), ("10^{-19}\\pi", "0")):
            assert verdict(form.format(one), form.format(one)).correct
            assert not verdict(form.format(other), form.format(one)).correct, (form, one, other)
            assert not verdict(form.format(one), form.format(other)).correct, (form, one, other)


@given(st.integers(1, 10**9), st.integers(-60, 60), st.integers(1, 10**9))
def test_a_number_equals_itself_at_any_size_and_no_other(digits, power, other):
    forms = (f"{digits}e{power}", f"{digits}\\times10^{{{power}}}", f"{digits} \\cdot 10^{{{power}}}")
    assert all(verdict(box, answer).reason in RIGHT for box in forms for answer in forms)
    if other != digits:
        assert not verdict(f"{other}e{power}", forms[1]).correct


def test_only_a_box_counts():
    assert grade(GradeRequest("The answer is 5.", "5")).reason is Reason.NO_BOX
    assert grade(GradeRequest("\\boxed{5} or \\boxed{6}", "5")).reason is Reason.DIFFERENT
    assert grade(GradeRequest("\\boxed{5} or \\boxed{6", "5")).reason is Reason.NO_BOX
    assert grade(GradeRequest("\\boxed{ }", "")).reason is Reason.EMPTY_BOX
    assert grade(GradeRequest("\\boxed{5" + " " * MAX_ANSWER + "}", "5")).reason is Reason.LONG_BOX
    assert grade(GradeRequest("\\boxed{5}", "")).reason is Reason.DIFFERENT


def test_the_reward_is_one_or_zero():
    assert (verdict("5", "5").reward, verdict("6", "5").reward) == (1.0, 0.0)


FORMS = (
    "{n}", "${n}$", "\\text{{{n}}}", "{n}\\text{{ cm}}", "{n}^{{\\circ}}", "\\left( {n} \\right)", "x = {n}",
    "\\ {n}\\,", "{n}.0", "{n}\\%", "\\$ {n}", "\\frac{{{n}}}{{1}}", "{n} apples",
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.integers(-(10**6), 10**6), st.sampled_from(FORMS), st.sampled_from([-1, 1, 10]))
def test_dress_does_not_change_an_integer(value, form, step):
    assert verdict(form.format(n=value), str(value)).correct
    assert not verdict(form.format(n=value + step), str(value)).correct


@given(st.integers(-50, 50), st.integers(1, 12), st.integers(-50, 50), st.integers(1, 12), st.booleans())
def test_fractions_are_equal_as_fractions(a, b, c, d, slash):
    box = f"{a}/{b}" if slash else f"\\dfrac{{{a}}}{{{b}}}"
    assert verdict(box, f"\\frac{{{c}}}{{{d}}}").correct == (Fraction(a, b) == Fraction(c, d))


@given(st.integers(0, 10**12))
def test_thousands_separators(value):
    for box in (f"{value:,}", f"{value:,}".replace(",", "{,}"), f"{value:,}".replace(",", "\\,")):
        assert verdict(box, str(value)).correct


INTERVALS = st.tuples(st.sampled_from("(["), st.integers(-9, 9), st.integers(1, 9), st.sampled_from(")]"))


@settings(max_examples=40, deadline=None)
@given(INTERVALS, INTERVALS)
def test_intervals_are_equal_end_by_end(one, other):
    def written(interval, space):
        left, low, width, right = interval
        return f"\\left{left}{space}{low},{space}{low + width}{space}\\right{right}"

    assert verdict(written(one, ""), written(one, "\\, ")).correct
    assert verdict(written(one, ""), written(other, "")).correct == (one == other)


CONTENTS = st.sampled_from(["red", "$x+1$", "7 m", "1:2", "north", "\\frac{3}{4}"])


@given(st.lists(CONTENTS, min_size=2, unique=True), st.data())
def test_exactly_one_option_is_right(options, data):
    right = data.draw(st.integers(0, len(options) - 1))
    answer = data.draw(st.sampled_from([LETTERS[right] if right < 5 else "F", options[right]]))
    for index, option in enumerate(options):
        letter = "ABCDEF"[index]
        for box in (letter, f"({letter})", f"\\text{{{letter}}}", option, f"({letter}) {option}"):
            assert verdict(box, answer, options).correct == (index == right)


@given(st.permutations(LETTERS), st.integers(2, 5), st.sampled_from([", ", " or ", "; ", " and ", ""]), st.booleans())
def test_naming_several_letters_never_earns_the_reward(letters, count, separator, parentheses):
    box = separator.join(f"({letter})" if parentheses else letter for letter in letters[:count])
    for options in (LETTERS, COLOURS):
        assert not verdict(box, letters[0], options).correct


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="\\{}[]()$%^_ abAB12.,;:~=<+-é", max_size=24), st.sampled_from(["5", "(1,2)", "A", "\\frac12"]))
def test_no_text_raises(text, answer):
    for options in ((), COLOURS):
        assert grade(GradeRequest("\\boxed{" + text, answer, options)).reward in (0.0, 1.0)
        assert grade(GradeRequest("\\boxed{" + text + "}", answer, options)).reward in (0.0, 1.0)


def test_every_real_reference_is_equal_to_itself_and_to_no_other():
    file = SHARED / "text/math500.json"
    if not file.is_file():
        pytest.skip(f"no shared data at {file}")
    answers = [row["final_answer"] for row in json.loads(file.read_text("utf-8"))]
    assert [answer for answer in answers if not verdict(answer, answer).correct] == []
    shifted = [(box, answer) for box, answer in pairwise(answers) if box != answer]
    assert [pair for pair in shifted if verdict(*pair).correct] == [("5", "x=5")]  # neighbours that are equal
