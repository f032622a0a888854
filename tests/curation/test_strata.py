"""Bins and weights by hand and by their properties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovr_megatron.curation.settings import WeighConfig
from ovr_megatron.curation.strata import equal_bins, group_weights


def test_weights_by_hand() -> None:
    # 4 and 16 rows at power 1/2: shares 2 : 4, so weights in proportion 1/2 : 1/4 with mean (4/2 + 16/4) / 20 = 0.3
    weights = group_weights(np.array([4, 16]), WeighConfig(power=0.5, min_weight=0.1, max_weight=10))
    assert weights == pytest.approx([0.5 / 0.3, 0.25 / 0.3])
    assert group_weights(np.array([4, 16]), WeighConfig(power=1.0)) == pytest.approx([1, 1])
    even = group_weights(np.array([4, 16]), WeighConfig(power=0.0, min_weight=0.1, max_weight=10))
    assert even * [4, 16] == pytest.approx([10, 10])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=8), st.floats(0, 1))
def test_the_mean_weight_is_one_within_the_caps(sizes: list[int], power: float) -> None:
    config = WeighConfig(power=power, min_weight=0.25, max_weight=4.0)
    counts = np.array(sizes)
    weights = group_weights(counts, config)
    assert (weights >= 0.25 - 1e-12).all() and (weights <= 4 + 1e-12).all()
    assert (weights * counts).sum() / counts.sum() == pytest.approx(1, rel=1e-9)
    assert all(
        weights[i] >= weights[j] - 1e-9 for i in range(len(sizes)) for j in range(len(sizes)) if sizes[i] < sizes[j]
    )


def test_bins_have_equal_sizes_and_keep_equal_values_together() -> None:
    values = np.random.default_rng(0).permutation(90).astype(float)
    assert np.bincount(equal_bins(values, 3)).tolist() == [30, 30, 30]
    assert equal_bins(values, 3)[values.argmax()] == 2
    assert len(set(equal_bins(np.ones(9), 3))) == 1
    assert equal_bins(np.array([np.nan, 1.0, 2.0, 3.0]), 3).tolist() == [0, 0, 1, 2]
