"""Whole iterations on two processes: every algorithm learns, halves of the system fit together, replays agree."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.both_cores

ROOT = Path(__file__).resolve().parents[2]
CLOCKS = ("timing/", "perf/", "memory/")


def curve(run: Path) -> list[dict[str, float]]:
    """Every metric but those of a clock."""
    lines = [json.loads(line) for line in (run / "metrics/train.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(CLOCKS)} for line in lines]


def weights(run: Path, name: str = "policy") -> dict:
    return load_file(sorted((run / "checkpoints").glob("step_*"))[-1] / name / "model.safetensors")


def rollouts(run: Path, iteration: int) -> dict[tuple[int, int], tuple]:
    """Tokens, log-probabilities and reward of every response that was learnt from."""
    folder = run / "rollouts" / f"{iteration:06d}"
    lines = map(json.loads, folder.with_suffix(".jsonl").read_text().splitlines())
    rewards = {(line["number"], line["sample"]): line["reward"] for line in lines}
    found = {}
    for path in folder.glob("*.safetensors"):
        file = load_file(path)
        cuts = np.cumsum(file["index"][:, 2])[:-1]
        parts = zip(np.split(file["tokens"], cuts), np.split(file["logprobs"], cuts), strict=True)
        for (prompt, sample, _), part in zip(file["index"].tolist(), parts, strict=True):
            found[prompt, sample] = (*part, rewards[prompt, sample])
    assert found.keys() <= rewards.keys()
    return found


def test_what_waits_in_host_memory_changes_no_bit(runs: Path) -> None:
    assert curve(runs / "ppo_offload") == curve(runs / "ppo")
    for name in ("policy", "critic"):
        ours, theirs = weights(runs / "ppo_offload", name), weights(runs / "ppo", name)
        assert all(ours[key].tobytes() == theirs[key].tobytes() for key in theirs)


ALL = ("ppo", "ppo_shared", "ppo_critic_tp2", "grpo", "dapo", "dr_grpo", "rloo", "reinforce_pp", "ppo_epochs")
ALL += ("gspo", "ppo_outside")


@pytest.mark.parametrize("name", ALL)
def test_every_algorithm_moves_the_policy(runs: Path, name: str) -> None:
    lines, start = curve(runs / name), load_file(runs / "model/model.safetensors")
    assert [line["step"] for line in lines] == [0, 1]
    assert 0 < lines[0]["reward/mean"] < 1
    assert all(line["policy/grad_norm"] > 0 and line["rollout/mismatch_max"] <= 1e-4 for line in lines)
    assert all(0 < line["rollout/mismatch_mean"] < line["rollout/mismatch_p99"] for line in lines)
    assert all(line["rollout/mismatch_p99"] <= line["rollout/mismatch_max"] for line in lines)
    moved = weights(runs / name)
    assert all(not np.array_equal(moved[key], start[key]) for key in start if key.endswith("proj.weight"))
    assert ("critic/loss" in lines[0]) == name.startswith("ppo")
    assert (sorted((runs / name / "checkpoints").glob("step_*"))[-1] / "critic").exists() == name.startswith("ppo")


def test_the_critic_may_have_another_layout(runs: Path) -> None:
    one, two = curve(runs / "ppo")[0], curve(runs / "ppo_critic_tp2")[0]
    for key in ("critic/loss", "critic/grad_norm", "critic/value_std", "policy/grad_norm", "policy/entropy"):
        assert two[key] == pytest.approx(one[key], rel=1e-4), key
    for name in ("policy", "critic"):
        first, other = weights(runs / "ppo", name), weights(runs / "ppo_critic_tp2", name)
        assert first.keys() == other.keys()


def test_a_shared_queue_draws_the_same_responses(runs: Path) -> None:
    one, two = rollouts(runs / "ppo", 0), rollouts(runs / "ppo_shared", 0)
    assert one.keys() == two.keys()
    same = [np.array_equal(one[key][0], two[key][0]) for key in one]
    assert np.mean(same) >= 0.9  # of 16; tests/rollout shows that where they part, two tokens were as likely


def test_stored_log_probabilities_are_the_detached_ones(runs: Path) -> None:
    """Two epochs begin with a ratio of 1, and the second finds a policy that has moved."""
    one, two = curve(runs / "ppo")[0], curve(runs / "ppo_stored")[0]
    assert one["policy/loss"] == pytest.approx(0, abs=1e-6)
    assert two["policy/loss"] < -1e-4
    assert rollouts(runs / "ppo", 0).keys() == rollouts(runs / "ppo_stored", 0).keys()


def test_dynamic_sampling_keeps_unequal_groups(runs: Path) -> None:
    for iteration, line in enumerate(curve(runs / "dapo")):
        groups: dict[int, list[float]] = {}
        for (prompt, _), (_, _, reward) in rollouts(runs / "dapo", iteration).items():
            groups.setdefault(prompt, []).append(reward)
        assert len(groups) == 4
        assert line["data/drawn_prompts"] in (4, 8, 12)
        text = (runs / "dapo/rollouts" / f"{iteration:06d}.jsonl").read_text().splitlines()
        assert len(text) == 4 * line["data/drawn_prompts"]  # those that nothing is learnt from can be read, too
        unequal = sum(len(set(rewards)) > 1 for rewards in groups.values())
        assert unequal == min(round(line["data/unequal_prompts"] * line["data/drawn_prompts"]), 4)


def test_learning_from_kept_rollouts_is_the_run_itself(runs: Path) -> None:
    for name in ("policy", "critic"):
        one, two = weights(runs / "ppo", name), weights(runs / "learned", name)
        assert [key for key in one if not np.array_equal(one[key], two[key])] == []
    assert [line["critic/loss"] for line in curve(runs / "ppo")] == [
        line["critic/loss"] for line in curve(runs / "learned")
    ]


def test_rolling_out_alone_is_the_run_itself(runs: Path) -> None:
    one, two = rollouts(runs / "ppo", 0), rollouts(runs / "rolled_out", 0)
    assert one.keys() == two.keys()
    for key, (tokens, logprobs, reward) in one.items():
        assert np.array_equal(tokens, two[key][0]) and np.array_equal(logprobs, two[key][1]) and reward == two[key][2]


def test_an_iteration_is_replayed_in_any_layout(runs: Path) -> None:
    found = json.loads((runs / "replays.json").read_text())
    assert {line["name"] for line in found["tp2"]} >= {"values", "advantages", "policy/grad_norm", "critic/grad_norm"}
    assert {line["name"] for line in found["rloo"]} >= {"old", "reference", "advantages", "policy/grad_norm"}
    for layout, lines in found.items():
        for line in lines:
            bound = 0.0 if layout == "same" else 1e-4
            assert line["difference"] <= bound or abs(line["now"] - line["saved"]) < 1e-6, (layout, line)


def test_critic_gradients_do_not_depend_on_the_cut(runs: Path) -> None:
    found = json.loads((runs / "gradients.json").read_text())
    print(found)
    assert all(cut["error"] <= 1e-6 for cut in found.values()), found
    assert found["micro-batches"]["packs"] >= 2 * found["micro-batches"]["before"]
