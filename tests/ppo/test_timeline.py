"""Clocks of ranks that begin an iteration at different times."""

from ovr_megatron.ppo.timeline import Timeline, align_ranks


def test_ranks_are_aligned_by_the_wait_that_ends_for_all() -> None:
    """The second rank began half a second before the first, and the third a quarter after it."""
    ranks = [[0.25, 2.0, 4.0], [0.375, 3.5, 4.5], [0.125, 3.0, 3.75]]
    begins, ends = align_ranks(ranks)
    assert begins == [0.5, 0.0, 0.75]
    assert ends == [[0.75, 2.5, 4.5], [0.375, 3.5, 4.5], [0.875, 3.75, 4.5]]


def test_activities_end_in_order() -> None:
    timeline = Timeline()
    seconds = [timeline.end(activity) for activity in ("draw", "engine", "wait")]
    assert timeline.activities == ["draw", "engine", "wait"]
    assert 0 <= timeline.ends[0] <= timeline.ends[1] <= timeline.ends[2] < 1
    assert seconds[2] == timeline.ends[2] - timeline.ends[1]
