"""Repeatness against the definition: distinct substrings counted one by one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovr_megatron.rewards.repetition import repeatness


def by_counting(text: str) -> float:
    n = len(text)
    distinct = {text[i:j] for i in range(n) for j in range(i + 1, n + 1)}
    return 1 - len(distinct) / (n * (n + 1) / 2) if n > 1 else 0.0


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab\U0001f600", max_size=40) | st.text(max_size=40))
def test_it_is_the_share_of_substrings_seen_before(text: str) -> None:
    assert repeatness(text) == pytest.approx(by_counting(text), abs=1e-12)


def test_by_hand() -> None:
    assert repeatness("abcd") == 0
    assert repeatness("aaaa") == pytest.approx(1 - 4 / 10)
    assert repeatness("abab") == pytest.approx(1 - 7 / 10)  # a b ab ba aba bab abab
