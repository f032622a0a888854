"""Both stages on two processes: layouts, repetition, resume, and the agreement of rollout and trainer."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ovr_megatron.model.tiny import make_tiny_model
from tests.ranks import launch
from tests.validation import reference, write_rows

ROOT = Path(__file__).resolve().parents[1]
CLOCKS = ("timing/", "perf/", "memory/")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("it's, (ü=1)")  # a path may hold any character
    make_tiny_model(out / "model", tied=True, seed=5)
    write_rows(out / "chats")
    for layout in (("1", "1"), ("2", "2"), ("2", "1")):
        launch(ROOT / "tests/stages.py", out, *layout, ranks=2, timeout_s=600)
    return out


def curve(run: Path) -> list[dict[str, float]]:
    """Every metric but those of a clock."""
    lines = [json.loads(line) for line in (run / "metrics/train.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(CLOCKS)} for line in lines]


def weights(run: Path, name: str = "policy") -> dict:
    return load_file(sorted((run / "checkpoints").glob("step_*"))[-1] / name / "model.safetensors")


def assert_same_bits(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not a[name].equal(b[name])] == []


@pytest.mark.parametrize("stage", ["cold", "epochs", "row_epochs", "validated", "bf16", "rl"])
def test_a_resumed_run_is_the_undisturbed_one(runs: Path, stage: str) -> None:
    assert curve(runs / stage) == curve(runs / f"{stage}_resumed")
    assert_same_bits(weights(runs / stage), weights(runs / f"{stage}_resumed"))
    if stage == "rl":
        assert_same_bits(weights(runs / "rl", "critic"), weights(runs / "rl_resumed", "critic"))


@pytest.mark.parametrize(("stage", "rows", "steps"), [("cold", 4, [2, 4]), ("rl", 3, [2, 3])])
def test_the_same_seed_gives_the_same_run_with_evaluation_on_the_way(
    runs: Path, stage: str, rows: int, steps: list[int]
) -> None:
    lines = curve(runs / f"{stage}_evaluated")
    scored = [line["step"] + 1 for line in lines if "evaluation/text" in line]
    assert scored == steps and len([line for line in lines if "data/fill" in line or stage == "rl"]) == rows
    plain = [{key: value for key, value in line.items() if not key.startswith("evaluation/")} for line in lines]
    assert [line for line in plain if len(line) > 1] == curve(runs / stage)
    assert_same_bits(weights(runs / stage), weights(runs / f"{stage}_evaluated"))


def test_a_validation_loss_leaves_the_training_as_it_is(runs: Path) -> None:
    lines = curve(runs / "validated")
    losses = {line["step"]: line for line in lines if "validation/loss" in line}
    assert list(losses) == [2, 3]  # after three steps, and at the end
    for line in losses.values():
        image, text = (line[f"validation/loss/source/{name}"] for name in ("image", "text"))
        assert min(image, text) < line["validation/loss"] < max(image, text)
    plain = [line for line in lines if "validation/loss" not in line]
    assert plain == curve(runs / "cold")
    assert_same_bits(weights(runs / "cold"), weights(runs / "validated"))
    held_out = [line["validation/loss"] for line in curve(runs / "row_epochs") if "validation/loss" in line]
    assert len(held_out) == 1


def test_the_validation_loss_is_that_of_transformers_in_every_layout(runs: Path) -> None:
    losses = json.loads((runs / "validation_0.json").read_text())
    expected = reference(runs / "model", runs / "chats")
    assert expected.keys() == {"", "images", "texts"} and len(losses) == 5
    for layout, (once, again) in losses.items():
        assert once == again, layout
        for source, loss in expected.items():
            key = f"validation/loss/source/{source}" if source else "validation/loss"
            assert once[key] == pytest.approx(loss, rel=1e-6), layout
    assert losses["dp=2"] == losses["zero=1"]


@pytest.mark.parametrize("step", ["step_000002", "step_000004"])
def test_evaluation_on_the_way_is_that_of_the_checkpoint(runs: Path, step: str) -> None:
    found, fresh = (
        (runs / "cold_evaluated" / where / step / "text.responses.jsonl").read_text().splitlines()
        for where in ("evaluation", "fresh")
    )
    assert len(found) == 6
    assert [json.loads(line)["response"] for line in found] == [json.loads(line)["response"] for line in fresh]


def test_a_run_by_steps_is_the_run_itself(runs: Path) -> None:
    assert curve(runs / "cold_by_steps") == curve(runs / "cold")
    assert_same_bits(weights(runs / "cold_by_steps"), weights(runs / "cold"))


def test_scores_of_chats_are_the_same_in_another_layout(runs: Path) -> None:
    one, two = (json.loads((runs / f"scores_tp{tp}.json").read_text()) for tp in (1, 2))
    assert len(one) == 3 and min(map(len, one)) > 3
    for ours, theirs in zip(one, two, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_two_epochs_of_a_tokenised_set_are_learnt_whole(runs: Path) -> None:
    steps = curve(runs / "epochs")
    records = json.loads((runs / "tokenised/manifest.json").read_text())["sources"][0]
    packs = 2 * len(steps)
    assert 2 * records["tokens"] <= sum(step["data/fill"] for step in steps) * 2 * 512 <= packs * 512
    assert len(steps) >= 4
    assert steps[-1]["loss/train"] < steps[0]["loss/train"]


def test_bfloat16_follows_float32(runs: Path) -> None:
    assert {tensor.dtype for tensor in weights(runs / "bf16").values()} == {torch.bfloat16}
    for wide, narrow in zip(curve(runs / "cold"), curve(runs / "bf16"), strict=True):
        assert narrow["loss/train"] == pytest.approx(wide["loss/train"], rel=0.02)


def test_training_changes_what_it_should_and_nothing_else(runs: Path) -> None:
    start, cold, rl = load_file(runs / "model/model.safetensors"), weights(runs / "cold"), weights(runs / "rl")
    frozen = [name for name in start if name.startswith("visual.")]
    assert frozen and all(start[name].equal(cold[name]) for name in frozen)
    moved = [name for name in start if not name.startswith("visual.")]
    assert all(not start[name].equal(cold[name]) for name in moved if name.endswith("proj.weight"))
    assert all(not start[name].equal(rl[name]) for name in start if name.endswith("proj.weight"))


@pytest.mark.parametrize("name", ["rl", "rl_cp2", "rl_pp2", "rl_tp2_engine_tp2", "rl_tp2_engine_tp1"])
def test_rollout_and_trainer_agree_in_every_iteration(runs: Path, name: str) -> None:
    lines = curve(runs / name)
    assert len(lines) == 3
    assert max(line["rollout/mismatch_max"] for line in lines) <= 1e-4
    assert all(line["policy/clip_fraction"] == 0 for line in lines)


def test_tensor_parallel_training_follows_data_parallel_training(runs: Path) -> None:
    for one, two in zip(curve(runs / "cold"), curve(runs / "cold_tp2"), strict=True):
        # The two see the same packs, cut differently over the ranks.
        assert two["loss/train"] == pytest.approx(one["loss/train"], rel=1e-4)
        assert two["optimizer/grad_norm"] == pytest.approx(one["optimizer/grad_norm"], rel=1e-3)


@pytest.mark.parametrize("name", ["rl_cp2", "rl_pp2"])
def test_ppo_is_the_same_in_other_layouts(runs: Path, name: str) -> None:
    one, two = curve(runs / "rl")[0], curve(runs / name)[0]
    for key in ("reward/mean", "response/length", "response/stopped"):
        assert two[key] == one[key]
    for key in ("critic/loss", "critic/value_std", "policy/entropy", "policy/grad_norm"):
        assert two[key] == pytest.approx(one[key], rel=1e-3), key


def test_a_run_goes_on_in_another_layout(runs: Path) -> None:
    before, after = curve(runs / "cold"), curve(runs / "cold_resumed_tp2")
    assert before[:2] == after[:2]
    assert after[2]["loss/train"] == pytest.approx(before[2]["loss/train"], rel=1e-6)
    assert after[3]["loss/train"] == pytest.approx(before[3]["loss/train"], rel=1e-5)


def test_spread_of_rewards_and_lengths_is_that_of_the_kept_responses(runs: Path) -> None:
    for line, path in zip(curve(runs / "rl"), sorted((runs / "rl/rollouts").glob("*.jsonl")), strict=True):
        rows = [json.loads(text) for text in path.read_text().splitlines()]
        rewards, lengths = [row["reward"] for row in rows], [row["tokens"] for row in rows]
        groups = [{row["reward"] for row in rows if row["number"] == number} for number in {r["number"] for r in rows}]
        assert line["response/reward_std"] == pytest.approx(statistics.pstdev(rewards))
        assert line["response/mixed_prompts"] == sum(len(group) > 1 for group in groups) / len(groups)
        assert line["response/length_max"] == max(lengths)
        assert line["response/length_p50"] == statistics.median(lengths)
        assert line["response/length_p50"] <= line["response/length_p90"] <= line["response/length_p99"]


def test_every_response_is_kept(runs: Path) -> None:
    files = sorted((runs / "rl/rollouts").glob("*.jsonl"))
    assert len(files) == 3
    assert any('"image": "rollouts/images/' in file.read_text() for file in files)
    for file in files:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(rows) == 4 * 4
        assert {row["image"] is None for row in rows if row["source"] == "text"} <= {True}
        assert all((runs / "rl" / row["image"]).exists() for row in rows if row["image"])
        assert all(row["reward"] in (0.0, 1.0) and row["tokens"] > 0 for row in rows)
