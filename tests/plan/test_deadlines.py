"""A job's limits beside the plan's seconds, by hand and for the shipped recipe."""

import pytest

from ovr_megatron.launch import compose
from ovr_megatron.plan.deadlines import Limits, problems, read_limits
from ovr_megatron.plan.report import Options, plan

DAY = 86400.0
FAST = float("inf")  # bytes a second: saving takes no time


def by_hand(generate: float, update: float) -> dict:
    parts = {"generate": generate, "update policy": update}
    return {
        "spans": [{"seconds": generate + update, "parts": parts, "micro_batches": 10}],
        "checkpoint_bytes": 100e9,
    }


def test_what_cannot_be_left_is_held_against_the_warning() -> None:
    step = by_hand(generate=1000, update=200)
    assert problems(step, Limits(300, DAY), 1800, FAST) == []
    (told,) = problems(step, Limits(299, DAY), 1800, FAST)
    assert "warned 299 s before" in told and "takes 300 s (1.5 times the plan's, and 0 s of saving)" in told
    assert told.endswith("OVR_WARNING_S=600")
    (told,) = problems(step, Limits(300, DAY), 1800, 1e9)
    assert "takes 400 s" in told and "100 s of saving" in told
    assert problems(step, Limits(0, None), 1800, FAST) == [], "without a time limit there is no warning"


def test_a_step_must_end_within_the_time_limit() -> None:
    step = by_hand(generate=1000, update=200)
    assert problems(step, Limits(300, 600 + 1800 + 300), 1800, FAST) == []
    (told,) = problems(step, Limits(300, 600 + 1800 + 299), 1800, FAST)
    assert "longer --time" in told


def test_the_watchdog_is_longer_than_ten_packs() -> None:
    assert problems(by_hand(1000, 200), Limits(300, DAY), 200, FAST) == []
    (told,) = problems(by_hand(1000, 200), Limits(300, DAY), 199, FAST)
    assert told.startswith("run.hang_timeout_s=199 would end a healthy run: a pack takes 20 s")
    assert problems(by_hand(1000, 200), Limits(300, DAY), 0, FAST) == []


@pytest.mark.parametrize(("world", "warning", "fits"), [(64, 1800, True), (16, 1800, False), (16, 3600, True)])
def test_the_shipped_warning_suffices_where_the_recipe_is_written_for(world: int, warning: int, fits: bool) -> None:
    config = compose("rl_7b_64gpu", ["model.path=7B", "offload=true"])
    found = problems(plan(config, Options(world, search=False)), Limits(warning, DAY), 1800, world / 8 * 500e6)
    assert (found == []) == fits, found


def test_limits_of_the_launcher() -> None:
    assert read_limits({"OVR_WARNING_S": "1800", "OVR_LIMIT_S": "3600"}) == Limits(1800, 3600)
    assert read_limits({"OVR_WARNING_S": "1800", "OVR_LIMIT_S": ""}) == Limits(1800, None)
    assert read_limits({}) == Limits(0, None)
