"""Metrics of a run's health by hand, on ragged responses of two sources, and the same on one and two ranks."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ovr_megatron.config import AlgorithmConfig, ParallelConfig
from ovr_megatron.data.packing import blank_pack
from ovr_megatron.model.scores import Scores
from ovr_megatron.ppo.advantage_histogram import BINS, SHOWN_BINS, histogram_over_ranks
from ovr_megatron.ppo.losses import LOSSES
from ovr_megatron.ppo.measures import repetition
from ovr_megatron.ppo.objectives import PolicyObjective
from ovr_megatron.runtime import distributed
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.runlog import RunLog
from tests.ppo import health_batch
from tests.ranks import launch


@pytest.fixture(scope="module")
def world() -> World:
    return distributed.start(ParallelConfig(), seed=1)


@pytest.fixture(scope="module")
def metrics(world: World) -> dict[str, float]:
    return health_batch.metrics(0, 1, world.layout)


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([], 0),
        ([1, 2, 3], 0),
        ([1, 2, 3, 4], 0),
        ([151_000, 7, 151_000, 7, 151_000, 7], 1 / 3),  # two of three 4-grams differ
        ([8] * 6, 2 / 3),
        ([5, 6, 7, 5, 6, 7, 5, 6], 2 / 5),
        ([0, 1, 0, 1, 1, 0, 0, 1, 0], 0),
    ],
)
def test_repetition_by_hand(tokens: list[int], share: float) -> None:
    assert repetition(tokens) == pytest.approx(share, abs=1e-15)


def test_repetition_counts_4_grams() -> None:
    rng = np.random.default_rng(1)
    for length in (4, 5, 50, 800):
        tokens = rng.integers(0, 4, size=length).tolist()
        grams = [tuple(tokens[i : i + 4]) for i in range(length - 3)]
        assert repetition(tokens) == pytest.approx(1 - len(set(grams)) / len(grams), abs=1e-15)


def test_spread_of_each_source_by_hand(metrics: dict[str, float]) -> None:
    """Lengths are 8, 1, 5 and 2 of texts, 4 and 6 of images; the rewards of one of three prompts differ."""
    assert metrics["response/repetition"] == pytest.approx((2 / 5 + 2 / 3) / 6)
    assert metrics["response/repetition/source/text"] == pytest.approx(2 / 5 / 4)
    assert metrics["response/repetition/source/image"] == pytest.approx(2 / 3 / 2)
    assert metrics["response/mixed_prompts"] == pytest.approx(1 / 3)
    assert metrics["response/mixed_prompts/source/text"] == 0.5
    assert metrics["response/mixed_prompts/source/image"] == 0
    assert metrics["response/length_p50"] == 4.5
    assert metrics["response/length_p50/source/text"] == 3.5
    assert metrics["response/length_p90/source/image"] == pytest.approx(5.8)
    assert metrics["response/length_max/source/text"] == 8
    assert metrics["response/reward_std/source/image"] == 0
    assert metrics["response/reward_std/source/text"] == pytest.approx(np.sqrt(3) / 4)


def literal_means(name: str, source: str) -> float:
    """The mean over the tokens of a source, by a loop."""
    values = []
    for i, (prompt, _, tokens) in enumerate(health_batch.TOKENS):
        if health_batch.SOURCES[prompt] != source:
            continue
        arrays = health_batch.arrays(i)
        advantages = health_batch.advantages(i)
        for token in range(len(tokens)):
            ratio = arrays["ratio"][token]
            low = ratio < 0.8 and advantages[token] < 0
            high = ratio > 1.2 and advantages[token] > 0
            value = {
                "policy/entropy": arrays["entropy"][token],
                "policy/clip_fraction": low or high,
                "policy/clip_fraction_low": low,
                "policy/clip_fraction_high": high,
                "rollout/kl": np.exp(0.5) - 1 - 0.5,  # the trainer has exp(0.5) times the probability
            }[name]
            values.append(float(value))
    return float(np.mean(values))


@pytest.mark.parametrize("source", ["text", "image"])
@pytest.mark.parametrize(
    "name",
    ["policy/entropy", "policy/clip_fraction", "policy/clip_fraction_low", "policy/clip_fraction_high", "rollout/kl"],
)
def test_means_over_the_tokens_of_a_source(metrics: dict[str, float], name: str, source: str) -> None:
    assert metrics[f"{name}/source/{source}"] == pytest.approx(literal_means(name, source), rel=1e-12)


def test_both_bounds_are_met(metrics: dict[str, float]) -> None:
    """Of images, whose rewards are 1, the upper bound alone: of ratios 0.5, 0.87, 1.23, 1.6 and of six, four in ten."""
    assert metrics["policy/clip_fraction_high/source/image"] == pytest.approx(0.4)
    assert metrics["policy/clip_fraction_low/source/image"] == 0
    assert metrics["policy/clip_fraction_low/source/text"] > 0 < metrics["policy/clip_fraction_high/source/text"]


@pytest.mark.parametrize("source", ["", "text", "image"])
def test_advantages_of_all_tokens(metrics: dict[str, float], source: str) -> None:
    arrays = []
    for i, (prompt, *_) in enumerate(health_batch.TOKENS):
        if source in ("", health_batch.SOURCES[prompt]):
            arrays.append(health_batch.advantages(i))
    values = np.concatenate(arrays)
    suffix = f"/source/{source}" if source else ""
    assert metrics[f"advantage/min{suffix}"] == values.min()
    assert metrics[f"advantage/max{suffix}"] == values.max()
    assert metrics[f"advantage/std{suffix}"] == pytest.approx(values.std(), rel=1e-12)
    width = (values.max() - values.min()) / BINS
    for percent in (10, 50, 90):
        quantile = np.quantile(values, percent / 100, method="inverted_cdf")
        assert quantile <= metrics[f"advantage/p{percent}{suffix}"] <= quantile + width * (1 + 1e-9)


def test_the_shown_histogram_has_every_token(metrics: dict[str, float]) -> None:
    values = np.concatenate([health_batch.advantages(i) for i in range(len(health_batch.TOKENS))])
    counts, _ = np.histogram(values, np.linspace(values.min(), values.max(), SHOWN_BINS + 1))
    assert metrics["histogram"] == counts.tolist()


def test_advantages_that_are_equal_absent_or_not_finite(world: World) -> None:
    equal = histogram_over_ranks([np.full(3, 0.25), np.full(2, 0.25)], world.layout)
    assert equal is not None
    assert equal.counts.sum() == 5 and equal.quantile(10) == equal.quantile(90) == 0.25
    assert histogram_over_ranks([], world.layout) is None
    assert histogram_over_ranks([np.array([np.nan])], world.layout) is None
    finite = histogram_over_ranks([np.array([1.0, np.inf, np.nan, 3.0])], world.layout)
    assert finite is not None and finite.counts.sum() == 2 and finite.total == 4


@pytest.mark.parametrize("name", list(LOSSES.rows))
def test_the_loss_does_not_depend_on_what_is_logged(world: World, name: str) -> None:
    """Value and gradient have the same bits with and without sources."""
    generator = torch.Generator().manual_seed(4)
    old = -torch.rand(9, generator=generator)
    arrays = {"advantages": torch.randn(9, generator=generator), "old_logprobs": old, "rollout_logprobs": old - 0.01}
    bounds = torch.tensor([0, 2, 9], dtype=torch.int32)
    start = (old + 0.4 * torch.randn(9, generator=generator)).clamp(max=-0.01)
    bits = []
    for more in ({}, {"sources": torch.tensor([0.0] * 2 + [1.0] * 7)}):
        pack = replace(blank_pack(rows=9), cu_seqlens=bounds, extras=arrays | more)
        logprobs = start.clone().requires_grad_()
        objective = PolicyObjective(AlgorithmConfig(loss=name), sources=("a", "b") if more else ())
        result = objective(Scores(torch.arange(9), logprobs=logprobs, entropy=torch.ones(9)), pack)
        result.total.backward()
        bits.append((result.total.detach(), logprobs.grad))
    assert torch.equal(bits[0][0], bits[1][0]) and torch.equal(bits[0][1], bits[1][1])
    means = objective.source_means.means()
    assert means["a"]["entropy"] == means["b"]["entropy"] == 1


def test_two_ranks_have_the_metrics_of_one(metrics: dict[str, float], tmp_path: Path) -> None:
    launch(Path(health_batch.__file__), tmp_path / "metrics.json", ranks=2, timeout_s=240)
    of_two = json.loads((tmp_path / "metrics.json").read_text())
    assert of_two.keys() == metrics.keys()
    for name, value in metrics.items():
        assert of_two[name] == pytest.approx(value, rel=1e-12, abs=1e-15), name


def test_tensorboard_has_the_histogram_and_no_other_tracker_needs_one(world: World, tmp_path: Path) -> None:
    histogram = histogram_over_ranks([np.array([-1.0, 0.0, 0.5]), np.array([3.0])], world.layout)
    assert histogram is not None
    log = RunLog(tmp_path, "train", trackers=["jsonl", "tensorboard"])
    log.histogram(7, "advantage", histogram.merged(4))
    log.close()
    assert not (tmp_path / "metrics/train.jsonl").exists() or not (tmp_path / "metrics/train.jsonl").read_text()
    events = EventAccumulator(str(tmp_path / "tensorboard/train"), size_guidance={"tensors": 0, "histograms": 0})
    events.Reload()
    (event,) = events.Histograms("advantage")
    shown = event.histogram_value
    assert event.step == 7
    assert (shown.min, shown.max, shown.num, shown.sum, shown.sum_squares) == (-1, 3, 4, 2.5, 10.25)
    assert shown.bucket_limit == [0, 1, 2, 3] and shown.bucket == [1, 2, 0, 1]
