"""What ranks' steps come to, by hand."""

import pytest

from ovr_megatron.runtime.steps import RankStep, rank_metrics


def test_two_ranks() -> None:
    steps = [RankStep(0.1, 1.0, 4e12, 2**30, 2**31), RankStep(0.3, 3.0, 0.0, 2**29, 2**30)]
    found = rank_metrics(steps, seconds=4.0, tokens=800, peak_flops=2e12)
    assert found == pytest.approx(
        {
            "perf/tokens_per_second": 200.0,
            "perf/tokens_per_second_per_gpu": 100.0,
            "perf/tflops_per_gpu": 0.5,
            "perf/mfu": 0.25,
            "timing/step": 4.0,
            "timing/data_wait": 0.3,
            "timing/rank_median": 2.0,
            "timing/rank_max": 3.0,
            "timing/rank_slowest": 1,
            "memory/peak_gib": 1.0,
            "memory/host_peak_gib": 2.0,
        }
    )
