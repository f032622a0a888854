"""Spikes, by hand."""

import math

from ovr_megatron.runtime.spikes import SpikeWatch

CALM = [1.0, 1.1, 0.9, 1.0, 1.2, 0.8, 1.0, 1.1]  # median 1, absolute deviations 0 0 0 .1 .1 .1 .2 .2: median 0.1


def watch(losses: list[float], deviations: float = 6.0) -> SpikeWatch:
    found = SpikeWatch(deviations, 8)
    assert [found.judge(loss) for loss in losses] == [None] * len(losses)
    return found


def test_a_loss_is_measured_in_robust_deviations() -> None:
    assert watch(CALM).judge(1.0 + 5.9 * 0.14826) is None
    score = watch(CALM).judge(1.0 + 6.1 * 0.14826)
    assert score is not None and math.isclose(score, 6.1, rel_tol=1e-3)
    assert watch(CALM, deviations=0.0).judge(100.0) is None
    assert watch(CALM).judge(-100.0) is None


def test_nothing_is_judged_before_there_is_something_to_judge_by() -> None:
    assert watch(CALM[:7]).judge(100.0) is None


def test_a_level_loss_may_move_a_little() -> None:
    assert watch([2.0] * 8).judge(2.0 + 5 * 0.002) is None
    assert watch([2.0] * 8).judge(2.0 + 7 * 0.002) is not None


def test_what_is_no_number_does_not_enter_the_window_which_goes_on_from_its_state() -> None:
    found = watch(CALM)
    found.judge(math.nan)
    assert found.state() == CALM
    other = SpikeWatch(6.0, 8)
    other.load(found.state())
    assert other.judge(3.0) == found.judge(3.0) is not None
