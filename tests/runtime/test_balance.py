"""Work is balanced over ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovr_megatron.runtime.balance import balance


@given(st.integers(1, 9), st.integers(0, 12), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_every_bin_gets_as_many_items_and_each_item_goes_once(bins, each, seed):
    costs = np.random.default_rng(seed).lognormal(size=bins * each)
    shares = balance(costs, bins, equal_counts=True)
    assert [len(share) for share in shares] == [each] * bins
    assert sorted(item for share in shares for item in share) == list(range(bins * each))
    assert all((np.diff(costs[share]) <= 0).all() for share in shares)


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 7), st.booleans())
def test_each_item_goes_to_the_first_bin_of_the_least_cost_that_is_not_full(costs, bins, equal_counts):
    """A literal transcription, with a look at every bin for every item."""
    shares = [[] for _ in range(bins)]
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least, larger = divmod(len(costs), bins)
        is_larger_free = sum(len(share) > least for share in shares) < larger
        is_free = [not equal_counts or len(s) < least or (len(s) == least and is_larger_free) for s in shares]
        loads = [sum(costs[i] for i in share) for share in shares]
        _, target = min((load, index) for index, load in enumerate(loads) if is_free[index])
        shares[target].append(item)
    assert balance(costs, bins, equal_counts) == shares


@pytest.mark.parametrize(
    ("costs", "bins", "options", "shares"),
    [
        ([1, 9, 5, 4], 2, {"equal_counts": True}, [[1, 0], [2, 3]]),
        ([7, 7], 2, {"equal_counts": True}, [[0], [1]]),
        ([1, 9, 4, 3], 2, {}, [[1], [2, 3, 0]]),
        ([1, 9, 5, 4], 2, {"in_order": True}, [[0, 2, 3], [1]]),
        ([], 2, {"equal_counts": True}, [[], []]),
    ],
)
def test_by_hand(costs, bins, options, shares):
    assert balance(costs, bins, **options) == shares
