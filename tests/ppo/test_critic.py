"""The critic's warm-up, training of the critic alone, and critics of another size than the policy."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from ovr_megatron.config import ConfigError, ParallelConfig, RLConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.families import ModelShape
from ovr_megatron.launch import compose, spelled_out
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.plan.heading import initial_weights
from ovr_megatron.ppo.warmup import MIN_IMPROVEMENT, CriticWarmup, policy_steps
from ovr_megatron.rl.record import describe_rollouts
from ovr_megatron.rl.sample_readers import check_reads_samples
from ovr_megatron.rl.setup import with_rewards
from ovr_megatron.runtime import distributed
from tests.ppo.reference import Iteration
from tests.ppo.test_loops import curve, weights

VALUE_HEAD = "value_head.weight"

# Rules and refusals --------------------------------------------------------------------------------------


def settings(*overrides: str) -> RLConfig:
    config = compose("tiny_rl", ["model.path=m", *overrides])
    assert isinstance(config, RLConfig)
    return config


def literal_end(values: list[float], iterations: int, patience: int) -> int:
    """The first iteration that is the ``patience``-th in a row without a rise, else ``iterations``."""
    best, stale = -np.inf, 0
    for i, value in enumerate(values[:iterations]):
        if value >= best + MIN_IMPROVEMENT:
            best, stale = value, 0
        else:
            stale += 1
        if patience and stale == patience:
            return i
    return iterations


@pytest.mark.parametrize("patience", [0, 1, 2, 3])
def test_the_warmup_ends_where_the_values_stop_to_improve(patience: int) -> None:
    rng = np.random.default_rng(3)
    for iterations in (0, 1, 4, 9):
        for _ in range(20):
            values = np.cumsum(rng.normal(0.005, 0.02, size=12)).tolist()
            warmup = CriticWarmup(iterations, patience)
            end = literal_end(values, iterations, patience)
            for i, value in enumerate(values):
                if i == 3:  # a resumed run goes on with what the checkpoint has
                    state = json.loads(json.dumps(warmup.state()))
                    warmup = CriticWarmup(iterations, patience)
                    warmup.load(state)
                warmup.observe(i, value)
                assert warmup.trains_policy(i) == (i >= end)
            assert warmup.first_policy_iteration == end


def test_a_warmup_by_hand() -> None:
    warmup = CriticWarmup(10, patience=2)
    ends = []
    for i, value in enumerate([0.0, 0.2, 0.205, 0.3, 0.31, 0.305, 0.9]):
        warmup.observe(i, value)
        ends.append(warmup.trains_policy(i))
    # 0.205 is no rise, 0.3 and 0.31 are; then 0.305 is the first without one, and 0.9 a rise again
    assert ends == [False] * 7
    warmup.observe(7, 0.9)
    assert not warmup.trains_policy(7)
    warmup.observe(8, 0.8)
    assert warmup.trains_policy(8) and warmup.end == 8


@pytest.mark.parametrize(("patience", "goes_on"), [(0, True), (1, False), (2, False), (3, True)])
def test_a_critic_that_ended_early_goes_on_with_more_patience(patience: int, goes_on: bool) -> None:
    first = CriticWarmup(10, patience=2, critic_only=True)
    ends = [first.observe(i, value) for i, value in enumerate([0.5, 0.5, 0.5])]
    assert ends == [False, False, True] and first.end == 2
    resumed = CriticWarmup(10, patience, critic_only=True)
    resumed.load(json.loads(json.dumps(first.state())))
    assert (resumed.end is None) == goes_on
    assert resumed.observe(3, 0.5) == (patience == 3)
    # The policy has learned since the end of its warm-up, which cannot be taken back.
    beside_a_policy = CriticWarmup(10, patience)
    beside_a_policy.load(first.state())
    assert beside_a_policy.end == 2


def test_the_policys_schedule_begins_where_the_warmup_ends() -> None:
    config = settings("iterations=20", "algorithm.critic_warmup_iterations=8", "algorithm.policy_steps=3")
    assert policy_steps(config, CriticWarmup.from_config(config)) == 36
    assert policy_steps(config, CriticWarmup(8, 2, end=5)) == 45
    alone = settings("only=critic", "rollouts_from=elsewhere", "iterations=20")
    assert not CriticWarmup.from_config(alone).trains_policy(19)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["only=critic"], "only=critic with rollouts_from=None: only=train and only=critic need the run folder"),
        (
            ["only=critic", "rollouts_from=a", "algorithm.estimator=grpo", "algorithm.critic_warmup_iterations=0"],
            "only=critic: algorithm.estimator=grpo has no critic; take gae",
        ),
        (
            ["only=critic", "rollouts_from=a", "run.export_every=20"],
            "run.export_every=20: there is no policy to export",
        ),
        (["only=critic", "rollouts_from=a", "model.lora.rank=4"], "only=critic with model.lora.rank=4: the checkpoint"),
        (
            ["only=critic", "rollouts_from=a", "algorithm.kl_coefficient=0.1", "algorithm.reference=r"],
            "only=critic with algorithm.kl_coefficient=0.1: the policy does not learn",
        ),
        (
            ["only=critic", "rollouts_from=a", "algorithm.kl_coefficient=0.1", "algorithm.kl_in=reward"],
            "only=critic with algorithm.kl_coefficient=0.1: the policy does not learn",
        ),
        (
            ["algorithm.critic_warmup_iterations=0", "algorithm.critic_warmup_patience=2"],
            "critic_warmup_patience=2 ends a warm-up early, and there is none",
        ),
        (["algorithm.lam_alpha=0.05", "algorithm.lam_policy=0.9"], "lam_alpha=0.05 takes the place of"),
        (
            ["algorithm.lam_policy=0.9", "algorithm.estimator=grpo", "algorithm.critic_warmup_iterations=0"],
            "algorithm.lam_policy=0.9: grpo has no critic, and so no lambda",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        settings(*overrides)


def test_a_critic_alone_may_learn_rewards_less_the_divergence_from_a_reference() -> None:
    divergence = ("algorithm.kl_coefficient=0.1", "algorithm.kl_in=reward", "algorithm.reference=r")
    assert settings("only=critic", "rollouts_from=a", *divergence).algorithm.kl_in == "reward"


def test_the_heading_names_no_engine_where_archived_rollouts_are_learned_from() -> None:
    world = distributed.start(ParallelConfig(), seed=1)
    assert describe_rollouts(settings(), world) == "1 vLLM engines, tp=1, on all ranks"
    for only in ("train", "critic"):
        learner = settings(f"only={only}", "rollouts_from=runs/a", "critic.path=c")
        assert describe_rollouts(learner, world) == "those of runs/a, no engine"
        assert initial_weights(learner) == {"train": "m", "critic": "c"}[only]


@pytest.mark.parametrize("only", ["rollout", "rehearsal"])
def test_a_program_is_told_where_jobs_that_train_nothing_run(only: str) -> None:
    with pytest.raises(ConfigError, match=f"RL takes only=all, train or critic; run only={only} with `ovr rl`"):
        with_rewards(settings(f"only={only}"), {})


def test_the_shortcut_of_the_critic_alone() -> None:
    assert spelled_out(["--critic-only", "runs/a", "x=1"]) == ["only=critic", "rollouts_from=runs/a", "x=1"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("critics")
    make_tiny_model(folder / "policy", seed=1)
    make_tiny_model(folder / "other_words", seed=1, corpus=["entirely other words of another language"] * 9)
    make_tiny_model(folder / "other_pixels", seed=1)
    path = folder / "other_pixels/preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.5, 0.5, 0.5]}))
    # A critic reads the policy's tokens: it needs no template.
    for template in (folder / "policy").glob("chat_template*"):
        (folder / "other_pixels" / template.name).unlink()
    return folder


def test_a_critic_that_cannot_read_the_policys_samples_is_refused(models: Path) -> None:
    config = settings(f"critic.path={models / 'other_words'}")
    processor = Processor(models / "policy", config.data)

    def check(folder: Path, shape: ModelShape) -> None:
        check_reads_samples(f"critic.path={folder}", folder, shape, processor, config.longest_sequence)

    with pytest.raises(ConfigError, match=r"have different vocabularies: \d+ tokens differ, .* give a model"):
        check(models / "other_words", ModelShape.from_hf(models / "other_words"))
    shape = processor.shape
    check(models / "policy", shape)
    with pytest.raises(ConfigError, match=r"have different pixels of a prompt with an image"):
        check(models / "other_pixels", shape)
    for change, says in (
        ({"vision": replace(shape.vision, patch=7)}, "has patch=7 in its vision tower, and the policy 14"),
        ({"vision": replace(shape.vision, tokens_per_second=1.0)}, "has tokens_per_second=1.0 in its vision tower"),
        ({"family": "another"}, "is a model of family another"),
        ({"max_positions": 64}, "with the longest prompt and response comes to 128 tokens, and the model has 64"),
    ):
        with pytest.raises(ConfigError, match=says):
            check(models / "policy", replace(shape, **change))


# Runs ----------------------------------------------------------------------------------------------------


def check_values(run: Path, folder: Path, head: torch.Tensor) -> None:
    """Compare the values of the first iteration with those of Transformers' model in ``folder`` under ``head``."""
    iteration = Iteration(run, 0)
    with torch.no_grad():
        hidden = iteration.hidden(iteration.load(folder), iteration.answers)
    assert len(iteration.answers) == 16
    for answer, states in zip(iteration.answers, hidden, strict=True):
        np.testing.assert_allclose(answer.saved["values"], (states @ head.T)[:, 0], atol=2e-5)


def steps(run: Path) -> list[int]:
    return [line["step"] for line in curve(run)]


@pytest.mark.both_cores
def test_the_critic_alone_learns_and_the_policy_is_in_no_checkpoint(runs: Path) -> None:
    lines = curve(runs / "critic_alone")
    assert [line["step"] for line in lines] == [0, 1]
    # The first iteration is that of the run which the rollouts are of: the policy has no part in it.
    for key in ("critic/loss", "critic/grad_norm", "critic/value_mean", "critic/value_std", "critic/return_mean"):
        assert lines[0][key] == curve(runs / "ppo")[0][key]
    assert not any(key.startswith("policy/") for line in lines for key in line)
    checkpoint = runs / "critic_alone/checkpoints/step_000002"
    assert (checkpoint / "critic").is_dir() and not (checkpoint / "policy").exists()


@pytest.mark.both_cores
def test_ppo_goes_on_from_a_critic_that_was_trained_alone(runs: Path) -> None:
    """Its first values are those that Transformers computes with the checkpoint's weights and value head."""
    folder = runs / "critic_alone/checkpoints/step_000002/critic"
    check_values(runs / "pretrained", folder, torch.from_numpy(load_file(folder / "model.safetensors")[VALUE_HEAD]))
    (trained,), fresh = curve(runs / "pretrained"), curve(runs / "ppo")[0]
    assert abs(trained["critic/value_mean"] - fresh["critic/value_mean"]) > 1e-3
    assert trained["critic/return_mean"] == fresh["critic/return_mean"]
    assert trained["policy/grad_norm"] > 0


@pytest.mark.both_cores
def test_an_early_end_of_the_warmup_is_a_shorter_warmup(runs: Path) -> None:
    """Bit for bit, with the policy's schedule, also in a run that goes on within the warm-up."""
    lines = curve(runs / "warm_patient")
    assert lines == curve(runs / "warm_fixed") and lines[1:] == curve(runs / "warm_resumed")
    assert ["policy/loss" in line for line in lines] == [False, False, True]
    assert all(abs(line["critic/explained_variance"]) + line["critic/value_std"] < 1e-12 for line in lines)
    for name in ("policy", "critic"):
        ours = weights(runs / "warm_patient", name)
        for other in ("warm_fixed", "warm_resumed"):
            theirs = weights(runs / other, name)
            assert all(ours[key].tobytes() == theirs[key].tobytes() for key in theirs)
    start = load_file(runs / "model/model.safetensors")
    assert any(not np.array_equal(weights(runs / "warm_patient")[key], start[key]) for key in start)


@pytest.mark.both_cores
def test_training_of_the_critic_alone_ends_where_its_values_stop_to_improve(runs: Path) -> None:
    assert steps(runs / "critic_early") == [0, 1]
    assert (runs / "critic_early/checkpoints/step_000002/manifest.json").exists()


@pytest.mark.both_cores
def test_a_critic_of_another_size(runs: Path) -> None:
    (line,) = curve(runs / "small_critic")
    assert line["critic/grad_norm"] > 0 and line["policy/grad_norm"] > 0
    generator = torch.Generator().manual_seed(1)
    check_values(runs / "small_critic", runs / "small", torch.empty(1, 64).normal_(0.0, 1 / 65, generator=generator))
    checkpoint = runs / "small_critic/checkpoints/step_000001"
    policy, critic = (ModelShape.from_hf(checkpoint / name) for name in ("policy", "critic"))
    assert (policy.hidden, policy.layers) == (128, 4) and (critic.hidden, critic.layers) == (64, 2)
    start, after = load_file(runs / "small/model.safetensors"), weights(runs / "small_critic", "critic")
    assert after["value_head.weight"].shape == (1, 64)
    assert all(after[key].shape == start[key].shape for key in start if key in after)
    assert all(not np.array_equal(after[key], start[key]) for key in start if key.endswith("proj.weight"))
    found = json.loads((runs / "replays.json").read_text())
    assert {entry["name"] for entry in found["small_critic"]} >= {"values", "advantages", "critic/grad_norm"}
    assert {entry["name"] for entry in found["critic_alone"]} >= {"values", "critic/loss", "critic/grad_norm"}
    # The warm-up of the replayed iteration had ended early.
    assert "policy/grad_norm" in {entry["name"] for entry in found["warm"]}
