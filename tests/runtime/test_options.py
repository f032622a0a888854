"""Numbers on a command line."""

import argparse

import pytest

from ovr_megatron.runtime.command import number, whole_number


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("12", 12), ("+3", 3), ("007", 7)])
def test_whole_numbers(text: str, value: int) -> None:
    assert whole_number(0)(text) == value


@pytest.mark.parametrize("text", ["-1", "1.0", "1e3", "", "two", "nan", "1_000", "9" * 30])
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number of at least 0"):
        whole_number(0)(text)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e400", "4", "half"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a finite number above 0 and of at most 1"):
        number(above=0, most=1)(text)


def test_numbers() -> None:
    assert number(above=0, most=1)("1e-3") == 1e-3
    assert number()("-2.5") == -2.5
    with pytest.raises(argparse.ArgumentTypeError, match=r"'inf' is not a finite number$"):
        number()("inf")
