"""An estimator and a loss from outside the package: in a module that a setting names, and registered by a program."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ovr_megatron.config import ConfigError, RLConfig
from ovr_megatron.data.packing import Pack, blank_pack
from ovr_megatron.launch import compose
from ovr_megatron.model.scores import Scores
from ovr_megatron.ppo import estimators, experience, losses
from ovr_megatron.ppo.batch import Response
from ovr_megatron.ppo.estimators import Estimate, Estimator, EstimatorInput, register_estimator
from ovr_megatron.ppo.experience import Models, compute_experience
from ovr_megatron.ppo.losses import find_loss, register_loss
from ovr_megatron.ppo.objectives import PolicyObjective
from ovr_megatron.runtime.registry import RegistryError

REWARDS = [1.0, 0.0, 0.0, 1.0]
LENGTHS = [2, 3, 1, 4]
VALUES = [np.full(n, 0.5 * i) for i, n in enumerate(LENGTHS)]


@pytest.fixture(autouse=True)
def tables_of_this_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimators, "ESTIMATORS", replace(estimators.ESTIMATORS, rows=dict(estimators.ESTIMATORS.rows)))
    monkeypatch.setattr(losses, "LOSSES", replace(losses.LOSSES, rows=dict(losses.LOSSES.rows)))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))  # as PYTHONPATH


def settings(*overrides: str) -> RLConfig:
    return compose("tiny_rl", ["model.path=m", "algorithm.critic_warmup_iterations=0", *overrides])


class Critic(SimpleNamespace):
    """Scores every pack with the same values; the batch below takes them for its own."""

    def scores(self, packs: list[Pack]) -> list[Scores]:
        return [Scores(torch.arange(sum(LENGTHS)), values=torch.from_numpy(np.concatenate(VALUES)))]


class OnePack(SimpleNamespace):
    """A batch that is one pack."""

    lengths = LENGTHS

    def __len__(self) -> int:
        return len(LENGTHS)

    def group_into_packs(self, members: range) -> list[list[int]]:
        return [list(members)]

    def packs(self, pack_members: list[list[int]]) -> list[Pack]:
        return [blank_pack()]

    def unpack(self, scored: list[torch.Tensor], pack_members: list[list[int]]) -> list[np.ndarray]:
        return np.split(scored[0].numpy(), np.cumsum(LENGTHS)[:-1])


def learn(config: RLConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
    """Return the advantages and the critic's targets of four responses to two prompts on the only rank."""
    monkeypatch.setattr(experience, "sum_over_dp", lambda values, layout: values)
    layout = object()
    critic = Critic(layout=layout) if config.algorithm.has_critic else None
    policy = SimpleNamespace(layout=layout)
    models = Models(replace(config, offload=False), SimpleNamespace(layout=layout), None, policy, critic, None)
    rows = [SimpleNamespace(source="puzzles")] * 2
    rollout = SimpleNamespace(limit=50, prompts=SimpleNamespace(sample=lambda prompt: [0] * 5, rows=rows))
    responses = []
    for i, (reward, length) in enumerate(zip(REWARDS, LENGTHS, strict=True)):
        responses.append(Response(i // 2, i % 2, [0] * length, np.zeros(length), True, "", reward))
    result, critic_batch = compute_experience(models, rollout, responses, OnePack(), 0)
    return result.advantages, critic_batch and critic_batch.returns


def test_an_estimator_of_a_users_module(monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings("algorithm.estimator=outside_rows:BLEND")
    assert config.algorithm.has_critic and config.algorithm.in_groups and config.algorithm.most_steps > 1
    advantages, returns = learn(config, monkeypatch)
    baselines = [(value + other) / 2 for value, other in zip(VALUES, [0.0, 1.0, 1.0, 0.0], strict=True)]
    raw = np.concatenate([reward - baseline for reward, baseline in zip(REWARDS, baselines, strict=True)])
    np.testing.assert_allclose(np.concatenate(advantages), (raw - raw.mean()) / (raw.std() + 1e-8), atol=1e-12)
    np.testing.assert_array_equal(np.concatenate(returns), np.repeat(REWARDS, LENGTHS))
    with pytest.raises(ConfigError, match=r"responses=1: algorithm.estimator=outside_rows:BLEND"):
        settings("algorithm.estimator=outside_rows:BLEND", "responses=1")


def test_an_estimator_that_a_program_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(batch: EstimatorInput) -> Estimate:
        return Estimate([np.full(len(r), batch.gamma * r.sum()) for r in batch.rewards])

    register_estimator("plain", Estimator(plain))
    config = settings("algorithm.estimator=plain", "algorithm.gamma=0.5")
    assert not config.algorithm.has_critic and not config.algorithm.in_groups
    advantages, returns = learn(config, monkeypatch)
    np.testing.assert_array_equal(np.concatenate(advantages), np.repeat(0.5 * np.array(REWARDS), LENGTHS))
    assert returns is None
    with pytest.raises(RegistryError, match="'plain' is registered already"):
        register_estimator("plain", Estimator(plain))


def loss_of(config: RLConfig, logprobs: torch.Tensor, old: torch.Tensor) -> tuple[float, dict[str, float]]:
    """Return the objective's loss of one pack of two responses, of two and three tokens, and its sums."""
    extras = {"advantages": torch.tensor([1.0, 1.0, -2.0, -2.0, -2.0]), "rollout_logprobs": old, "old_logprobs": old}
    pack = replace(blank_pack(rows=5), cu_seqlens=torch.tensor([0, 2, 5], dtype=torch.int32), extras=extras)
    scores = Scores(torch.arange(5), logprobs=logprobs, entropy=torch.zeros(5))
    result = PolicyObjective(config.algorithm)(scores, pack)
    return float(result.total), {name: float(value) for name, value in result.sums.items()}


OLD = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0])
NEW = torch.tensor([-1.1, -1.3, -0.7, -1.0, -0.4])


def test_a_loss_of_a_users_module_knows_the_responses() -> None:
    total, sums = loss_of(settings("algorithm.loss=outside_rows:sequence_weighted"), NEW, OLD)
    first, second = np.exp(-0.2), 1.2  # exp(mean of 0.3, 0 and 0.6) lies over 1 + clip
    assert total == pytest.approx(first * 2.4 - 2 * second * 2.1, rel=1e-6)
    assert sums["policy/response_weight"] == pytest.approx(2 * first + 3 * second, rel=1e-6)
    assert "policy/clip_fraction" not in sums


def test_a_loss_that_a_program_registers() -> None:
    register_loss("plain", lambda logprobs, old, advantages, segments, settings: (-advantages * logprobs, {}))
    total, sums = loss_of(settings("algorithm.loss=plain"), NEW, OLD)
    assert total == pytest.approx(2.4 - 2 * 2.1, rel=1e-6)
    assert sums.keys() == {"entropy", "rollout_kl"}
    with pytest.raises(RegistryError, match="'clip' is registered already"):
        register_loss("clip", find_loss("gspo"))
    with pytest.raises(RegistryError, match="a name with a colon"):
        register_loss("a:b", find_loss("gspo"))


def test_the_example_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).resolve().parents[2] / "docs/algorithms.md"
    (tmp_path / "my_rows.py").write_text(page.read_text().split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    config = settings("algorithm.estimator=my_rows:REINFORCE", "algorithm.loss=my_rows:unclipped")
    advantages, _ = learn(config, monkeypatch)
    raw = np.repeat(REWARDS, LENGTHS)
    np.testing.assert_allclose(np.concatenate(advantages), (raw - raw.mean()) / raw.std(), rtol=1e-6)
    total, _ = loss_of(config, NEW, OLD)
    assert total == pytest.approx(np.exp(-0.2) * 2.4 - 2 * np.exp(0.3) * 2.1, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "gea",
            r"algorithm.estimator='gea' is not known \(did you mean gae\?\); choose one of gae, grpo, dr_grpo, rloo",
        ),
        ("outside_row:BLEND", "algorithm.estimator=outside_row:BLEND: No module named 'outside_row'"),
        ("outside_rows:BLENDS", "BLENDS: .*outside_rows.py has no BLENDS; did you mean outside_rows:BLEND"),
        ("outside_rows:blend", "is of type function; make it an ovr_megatron.ppo.estimators.Estimator"),
    ],
)
def test_an_unknown_estimator_is_refused_with_the_settings(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        settings(f"algorithm.estimator={name}")
