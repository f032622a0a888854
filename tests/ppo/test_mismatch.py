"""The difference of rollout and trainer: mean, quantile and maximum against numpy, apart by modality."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ovr_megatron.config import ParallelConfig, RolloutConfig
from ovr_megatron.launch import compose
from ovr_megatron.ppo.mismatch import MODALITIES, QUANTILE, STALENESS, Mismatch, token_modalities
from ovr_megatron.rl.training import warn
from ovr_megatron.runtime import distributed

EDGE = 10 ** (1 / 24) * (1 + 1e-9)  # of one bin to the next


@pytest.fixture(scope="module", autouse=True)
def process_group() -> None:
    distributed.start(ParallelConfig(), seed=1)


def drawn(modalities: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences over ten decades, some of them 0, and the modality of each."""
    generator = torch.Generator().manual_seed(7)
    chosen = torch.tensor(modalities)[torch.randint(0, len(modalities), (5000,), generator=generator)]
    differences = (torch.randn(5000, generator=generator) * 3 - 6 - chosen).exp()
    return torch.where(differences < 1e-5, 0.0, differences), chosen


def counted(differences: torch.Tensor, modalities: torch.Tensor) -> dict[str, float]:
    """The metrics of tokens that come in packs of many sizes, one of them empty."""
    mismatch = Mismatch()
    cuts = [0, 1, 17, 17, 2500, len(differences)]
    for first, end in pairwise(cuts):
        mismatch.add(differences[first:end], modalities[first:end].float())
    return mismatch.metrics()


def check(metrics: dict[str, float], differences: torch.Tensor, suffix: str = "") -> None:
    values = differences.double().numpy()
    quantile = float(np.quantile(values, QUANTILE, method="inverted_cdf"))
    assert metrics[f"rollout/mismatch_mean{suffix}"] == pytest.approx(values.mean(), rel=1e-12)
    assert metrics[f"rollout/mismatch_max{suffix}"] == values.max()
    assert quantile <= metrics[f"rollout/mismatch_p99{suffix}"] <= quantile * EDGE


def test_every_modality_has_its_own_numbers() -> None:
    differences, modalities = drawn([0, 1, 2])
    metrics = counted(differences, modalities)
    check(metrics, differences)
    for i, name in enumerate(MODALITIES):
        check(metrics, differences[modalities == i], f"/{name}")
    assert len(metrics) == 12


def test_one_modality_is_not_said_twice() -> None:
    differences, modalities = drawn([1])
    metrics = counted(differences, modalities)
    check(metrics, differences)
    assert len(metrics) == 3


def test_every_staleness_has_its_own_numbers() -> None:
    """Ages 0, 2 and 11, of which the last belongs to the group of 8 and more."""
    differences, modalities = drawn([0])
    ages = torch.tensor([0.0, 2.0, 11.0])[torch.arange(len(differences)) % 3]
    mismatch = Mismatch(by_staleness=True)
    for first, end in pairwise([0, 700, 700, len(differences)]):
        mismatch.add(differences[first:end], modalities[first:end].float(), ages[first:end])
    metrics = mismatch.metrics()
    check(metrics, differences)
    for age, group in ((0, 0), (2, 2), (11, 8)):
        check(metrics, differences[ages == age], f"/{STALENESS[group]}")
    assert len(metrics) == 12


def test_one_token_does_not_move_the_quantile() -> None:
    differences = torch.full((100_000,), 1e-3)
    differences[5] = 7.0
    metrics = counted(differences, torch.zeros(100_000))
    assert metrics["rollout/mismatch_p99"] <= 1e-3 * EDGE and metrics["rollout/mismatch_max"] == 7.0


@pytest.mark.parametrize("value", [0.0, 1e-30, 5e4, float("inf"), float("nan")])
def test_no_number_falls_out_of_the_bins(value: float) -> None:
    metrics = counted(torch.full((3000,), value), torch.zeros(3000))
    assert np.isnan(metrics["rollout/mismatch_mean"]) == np.isnan(value)
    assert not np.isfinite(value) or metrics["rollout/mismatch_p99"] <= metrics["rollout/mismatch_max"]


def test_without_tokens_nothing_is_wrong() -> None:
    assert set(Mismatch().metrics().values()) == {0.0}


def test_a_prompt_is_what_it_shows() -> None:
    def sample(pictures: int, videos: int) -> Any:
        return SimpleNamespace(grid_thw=np.zeros((pictures + videos, 3)), videos=[None] * videos)

    arrays = token_modalities([sample(0, 0), sample(2, 0), sample(1, 1), sample(0, 1)], [2, 1, 3, 1])
    assert [array.tolist() for array in arrays] == [[0, 0], [1], [2, 2, 2], [2]]


@pytest.mark.parametrize(
    ("metrics", "warns"),
    [
        ({"rollout/mismatch_p99": 0.1}, True),
        ({"rollout/mismatch_p99": 0.01}, False),
        # All tokens are the current policy's: their statistics are those of all.
        ({"rollout/mismatch_p99": 0.1, "rollout/staleness_share/0": 1.0}, True),
        ({"rollout/mismatch_p99": 0.1, "rollout/staleness_share/0": 0.0}, False),
        (
            {
                "rollout/mismatch_p99": 0.1,
                "rollout/mismatch_p99/staleness_0": 0.01,
                "rollout/staleness_share/0": 0.5,
            },
            False,
        ),
        (
            {
                "rollout/mismatch_p99": 0.2,
                "rollout/mismatch_p99/staleness_0": 0.1,
                "rollout/staleness_share/0": 0.5,
            },
            True,
        ),
    ],
)
def test_what_the_policy_has_learned_since_is_not_warned_of(
    caplog: pytest.LogCaptureFixture, metrics: dict[str, float], warns: bool
) -> None:
    config: Any = SimpleNamespace(rollout=RolloutConfig())
    with caplog.at_level("WARNING"):
        warn(metrics, 3, config)
    assert bool(caplog.records) == warns


@pytest.mark.parametrize(
    ("staleness", "correction", "warns"), [(1, None, True), (1, "icepop", False), (0, None, False)]
)
def test_stale_tokens_without_a_correction_are_warned_of(
    caplog: pytest.LogCaptureFixture, staleness: int, correction: str | None, warns: bool
) -> None:
    changes = ["model.path=m", "rollout.oversample=0.5", f"rollout.max_staleness={staleness}"]
    config = compose("tiny_rl", [*changes, f"algorithm.correction={correction or 'null'}"])
    with caplog.at_level("WARNING"):
        warn({}, 0, config)
    assert ("algorithm.correction=token_truncate weighs them" in caplog.text) == warns
