"""Oracles: Wilson's formula worked by hand, pass@k by counting every draw."""

import itertools

import pytest

from ovr_megatron.evaluation.statistics import mean_of_first, mean_of_last, moving_average, pass_at_k, wilson


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # z = 1.959964, z^2 = 3.841459.  For 8 of 10: centre = (.8 + .1920729) / 1.3841459 = .716740,
        # half = sqrt(3.841459 * (.016 + .009603647)) / 1.3841459 = .226578.
        (8, 10, 0.490162, 0.943318),
        # p = 1/2: centre 1/2, half = z / (2 sqrt(n + z^2)) = 1.959964 / (2 * 10.190259) = .096169.
        (50, 100, 0.403832, 0.596168),
        # p = 0: low 0, high = z^2 / (n + z^2) = 3.841459 / 503.841459.
        (0, 500, 0.0, 0.0076243),
        (500, 500, 0.9923757, 1.0),
    ],
)
def test_wilson_is_the_interval_worked_by_hand(correct, total, low, high):
    share = wilson(correct, total)
    assert share.value == correct / total
    assert share.total == total
    assert share.low == pytest.approx(low, abs=2e-6)
    assert share.high == pytest.approx(high, abs=2e-6)


def test_wilson_narrows_with_trials_and_widens_with_confidence():
    assert wilson(500, 1000).high < wilson(50, 100).high < wilson(50, 100, confidence=0.99).high


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (-1, 3), (4, 3)])
def test_wilson_refuses_what_is_no_share(correct, total):
    with pytest.raises(ValueError, match="is no share"):
        wilson(correct, total)


@pytest.mark.parametrize("samples", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(samples):
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        answers = [index < correct for index in range(samples)]
        draws = [any(draw) for draw in itertools.combinations(answers, k)]
        assert pass_at_k(samples, correct, k) == pytest.approx(sum(draws) / len(draws), abs=1e-12)


def test_pass_at_k_holds_for_many_samples():
    # 1 - (1023/1024) (1022/1023) ... telescopes to k/n for a single right one.
    assert pass_at_k(1024, 1, 256) == pytest.approx(0.25, abs=1e-12)


@pytest.mark.parametrize(("samples", "correct", "k"), [(4, 1, 5), (4, 5, 1), (4, 1, 0)])
def test_pass_at_k_refuses_impossible_counts(samples, correct, k):
    with pytest.raises(ValueError, match="at most"):
        pass_at_k(samples, correct, k)


def test_means_of_the_ends():
    values = [1.0, 2.0, 3.0, 10.0]
    assert mean_of_first(values, 2) == 1.5
    assert mean_of_last(values, 2) == 6.5
    assert mean_of_last(values, 10) == mean_of_first(values, 10) == 4.0
    assert mean_of_first([], 10) is None


def test_moving_average_looks_back_only():
    assert moving_average([1.0, 3.0, 5.0, 1.0], 2) == [1.0, 2.0, 4.0, 3.0]
    assert moving_average([], 3) == []
