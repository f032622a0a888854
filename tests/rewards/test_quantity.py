"""Numbers and units."""

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovr_megatron.rewards.latex import clean
from ovr_megatron.rewards.quantity import has_unit, number, split_unit

INTEGERS = st.integers(-(10**12), 10**12)


@given(INTEGERS)
def test_integers(value):
    assert number(str(value)) == value


@given(st.decimals(allow_nan=False, allow_infinity=False, places=6, min_value=-(10**9), max_value=10**9))
def test_decimals(value: Decimal):
    assert number(format(value, "f")) == Fraction(value)


@given(INTEGERS, st.integers(1, 10**6), st.sampled_from(["{a}/{b}", "\\frac{{{a}}}{{{b}}}"]))
def test_fractions(over, under, form):
    assert number(form.format(a=over, b=under)) == Fraction(over, under)


@given(st.integers(0, 999), st.integers(1, 99), st.integers(1, 99), st.sampled_from(["", "-"]))
def test_mixed_numbers(whole, over, under, sign):
    expected = (whole + Fraction(over, under)) * (-1 if sign else 1)
    assert number(f"{sign}{whole} {over}/{under}") == expected
    assert number(f"{sign}{whole}\\frac{{{over}}}{{{under}}}") == expected


@pytest.mark.parametrize("text", ["", "x", "1+1", "1/0", "\\frac{1}{0}", "2^10", "1,2", "--1", "1e", "e5", "9" * 61])
def test_all_else_is_no_plain_number(text):
    assert number(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8 m", "8"),
        ("8 \\mathrm{~m}", "8"),
        ("13 \\mathrm{~cm}^{2}", "13"),
        ("3 \\pi \\mathrm{cm}^{3}", "3 \\pi"),
        ("30 \\sqrt{5} \\mathrm{~m}", "30 \\sqrt{5}"),
        ("5 km/h", "5"),
        ("12 square units", "12"),
        ("9.8 m/s^2", "9.8"),
        ("21 jumps", "21"),
        ("13 little white cubes", "13"),
        ("\\frac{1}{2} turn", "\\frac{1}{2}"),
    ],
)
def test_a_unit_or_noun_is_cut_off(text, value):
    rest, unit = split_unit(clean(text))
    assert (rest, unit is not None) == (value, True)
    assert has_unit(text)


@pytest.mark.parametrize(
    "text",
    ["8", "m", "2k", "3R^2", "5m", "s^2-2 s", "V=\\frac{3}{2} W", "2 \\sin x", "40 black and 41 white", "10 or more",
     "5 million", "x_max", "less than 10", "2 xy", "\\pi"],
)  # fmt: skip
def test_variables_and_words_that_change_the_value_stay(text):
    assert split_unit(text) == (text, None)


def test_a_letter_at_a_number_is_a_unit_only_where_asked():
    assert split_unit("8m", attached=True)[0] == "8"
    assert split_unit("8m") == ("8m", None)


@pytest.mark.parametrize(
    ("one", "other", "factor"),
    [
        ("1 km", "1 m", 1000),
        ("1 cm^2", "1 m^2", Fraction(1, 10**4)),
        ("1 square cm", "1 cm^2", 1),
        ("1 m squared", "1 m^2", 1),
        ("1 km/h", "1 m/s", Fraction(1000, 3600)),
        ("1 kilometers per hour", "1 m/s", Fraction(1000, 3600)),
        ("1 hour", "1 s", 3600),
        ("1 ft", "1 inches", 12),
        ("1 miles", "1 ft", 5280),
        ("1 dollar", "1 cents", 100),
    ],
)
def test_scales_agree_with_the_definitions_of_the_units(one, other, factor):
    first, second = split_unit(one)[1], split_unit(other)[1]
    assert first is not None and second is not None and first.dimensions == second.dimensions
    assert first.scale / second.scale == factor
