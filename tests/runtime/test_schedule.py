"""Learning rates, by hand."""

import pytest

from ovr_megatron.config import OptimizerConfig
from ovr_megatron.runtime.schedule import learning_rate


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.92, 0.84, 0.76, 0.68, 0.6, 0.52, 0.44, 0.36, 0.28]),
        # a third of 12 steps decays: from step 8, which still has the whole rate, by a fifth each to 0.2
        ("wsd", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4]),
    ],
)
def test_rates_of_twelve_steps(schedule: str, expected: list[float]) -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=2, min_lr_ratio=0.2, schedule=schedule, decay_share=1 / 3)
    assert [learning_rate(step, 12, config) for step in range(12)] == pytest.approx(expected)


def test_the_cosine_is_half_way_in_the_middle() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=0, min_lr_ratio=0.1, schedule="cosine")
    assert [learning_rate(step, 10, config) for step in (0, 5, 10)] == pytest.approx([1.0, 0.55, 0.1])
