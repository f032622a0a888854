"""The last box and the plain form of an answer."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovr_megatron.rewards.latex import clean, key, last_box

PLAIN = st.text(alphabet="abc 123+-=\\{}$\n", max_size=12).filter(lambda text: text.count("\\") == 0)
LEAF = st.text(alphabet="xy 12,.+", max_size=6)
BALANCED = st.recursive(
    LEAF,
    lambda inner: st.one_of(
        inner.map(lambda text: "{" + text + "}"),
        inner.map(lambda text: "\\sqrt{" + text + "}"),
        inner.map(lambda text: "\\left\\{" + text + "\\right\\}"),
        st.tuples(inner, inner).map("".join),
    ),
    max_leaves=8,
)


@given(before=PLAIN, content=BALANCED, after=PLAIN, earlier=BALANCED)
def test_the_content_of_the_last_box_comes_back_whole(before, content, after, earlier):
    text = f"\\boxed{{{earlier}}} {before.replace('{', '')} \\boxed{{{content}}}{after}"
    assert last_box(text) == content


@pytest.mark.parametrize(
    ("response", "box"),
    [
        ("no box, the answer is 5", None),
        ("\\boxed 5", "5"),
        ("$\\boxed 12$.", "12"),
        ("\\boxed5", "5"),
        ("\\boxed -3/4.", "-3/4"),
        ("\\boxed A.", "A"),
        ("\\fbox{5}", "5"),
        ("\\boxed{5}, in a \\boxed as asked", "5"),
        ("\\boxed 5x", None),
        ("\\boxed 1.5^2", None),
        ("\\boxed 5+3", None),
        ("\\boxed{5} then \\boxed{6", None),
        ("write \\boxed{ around it: \\boxed{6}", "6"),
        ("\\boxed{5} then \\boxed{6}", "6"),
        ("\\boxed {\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\boxed{5} + 1}", "\\boxed{5} + 1"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\{1}", "\\{1"),
        ("\\begin{cases} \\boxed{7} \\end{cases}", "7"),
        ("} \\boxed{7} {", "7"),
        ("\\boxed{}", ""),
    ],
)
def test_last_box(response, box):
    assert last_box(response) == box


@pytest.mark.parametrize(
    ("response", "box", "after_an_opened_thought"),
    [
        ("So 5.</think>\\boxed{5}", "5", "5"),
        ("So \\boxed{5}.</think>", None, None),
        ("So \\boxed{5}.</think>Done.", None, None),
        ("So \\boxed{5}.</think>\\boxed{6}", "6", "6"),
        ("\\boxed{5}</think>or</think>", None, None),
        ("<think>So \\boxed{5}", None, None),
        ("So \\boxed{5}", "5", None),
    ],
)
def test_a_box_within_the_thought_is_no_answer(response, box, after_an_opened_thought):
    assert last_box(response) == box
    assert last_box(response, thinking=True) == after_an_opened_thought


def test_a_hostile_response_is_scanned_in_linear_time():
    began = time.perf_counter()
    assert last_box("\\boxed{" * 100_000) is None
    assert last_box("\\boxed{" * 50_000 + "}" * 50_000) is not None
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("$\\dfrac12$", "\\frac{1}{2}"),
        ("\\tfrac{1}2", "\\frac{1}{2}"),
        ("11\\sqrt2", "11\\sqrt{2}"),
        ("2√5", "2\\sqrt{5}"),
        ("2*sqrt(5)", "2\\cdot \\sqrt{5}"),
        ("x**2", "x^2"),
        ("5²", "5^2"),
        ("10¹²", "10^{12}"),
        ("**A**", "A"),
        ("\\textbf{(A)}", "(A)"),
        ("（A）", "(A)"),  # noqa: RUF001
        ("\\text{(E)}\\ \\text{none}", "(E) none"),
        ("90^{\\circ}", "90"),
        ("20 °C", "20celsius"),
        ("\\mathrm{cm}^{2}", "cm^2"),
        ("10{,}080", "10080"),
        ("11,\\! 111,\\! 111,\\! 100", "11111111100"),
        ("12\\,000", "12000"),
        ("(1,234)", "(1,234)"),
        ("1,2,3", "1,2,3"),
        (".35625", ".35625"),
        ("5.", "5"),
        ("10!", "10!"),
        ("\\$18.90", "18.90"),
        ("40\\%", "40%"),
        ("x \\leq 3", "x \\le 3"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "( 3, \\frac{\\pi }{2} )"),
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
    ],
)
def test_clean(written, plain):
    assert key(written) == plain.replace(" ", "")
    assert key(clean(written)) == key(written)
