"""Ranks that only generate: the same responses and weights as without them, restarts, and ends of either side."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ovr_megatron.model.tiny import make_tiny_model
from tests.model.matrix import WHOLE
from tests.ppo.test_loops import CLOCKS, rollouts, weights
from tests.ranks import launch

pytestmark = pytest.mark.both_cores

SCRIPT = Path(__file__).with_name("split.py")
# What travels differs, as the weights are on other ranks.
TRAFFIC = ("sync/",)


def curve(run: Path) -> list[dict[str, float]]:
    """Every metric but those of a clock and of traffic."""
    lines = [json.loads(line) for line in (run / "metrics/train.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(CLOCKS + TRAFFIC)} for line in lines]


def assert_same_run(ours: Path, theirs: Path, iterations: range) -> None:
    """Compare weights, responses and metrics of two runs, bit for bit."""
    models = [path.name for path in sorted((theirs / "checkpoints").glob("step_*"))[-1].iterdir() if path.is_dir()]
    for name in {"policy", "critic"}.intersection(models):
        one, two = weights(ours, name), weights(theirs, name)
        assert [key for key in two if one[key].tobytes() != two[key].tobytes()] == []
    for iteration in iterations:
        one, two = rollouts(ours, iteration), rollouts(theirs, iteration)
        assert one.keys() == two.keys()
        for key in one:
            assert all(np.array_equal(a, b) for a, b in zip(one[key], two[key], strict=True)), key


def spans(out: Path, name: str, side: str) -> dict[int, tuple[float, float]]:
    """Return begin and end of each iteration's work on a side."""
    return {iteration: (begin, end) for iteration, begin, end in json.loads((out / f"{name}.{side}.json").read_text())}


def versions(run: Path, iteration: int) -> set[int]:
    """Return the iterations whose weights drew the tokens of an iteration."""
    files = (run / "rollouts" / f"{iteration:06d}").glob("*.safetensors")
    return {int(version) for path in files for version in load_file(path).get("versions", [iteration])}


def response_versions(run: Path) -> list[np.ndarray]:
    """Return the versions [n] of every response of a run that has those of older weights."""
    arrays: list[np.ndarray] = []
    for path in run.glob("rollouts/*/*.safetensors"):
        file = load_file(path)
        lengths = file["index"][:, 2]
        arrays += np.split(file["versions"], np.cumsum(lengths)[:-1])
    return arrays


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run folders of split.py, one trainer beside one generator."""
    out = tmp_path_factory.mktemp("split")
    make_tiny_model(out / "model", tied=True, seed=5)
    with pytest.raises(AssertionError, match=r"-9.*(\n.*)*has lost another rank of the job"):
        launch(SCRIPT, out, "first", ranks=2, timeout_s=240)
    launch(SCRIPT, out, "second", ranks=2, timeout_s=240)
    return out


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run folders of split.py whose responses are up to two iterations old."""
    out = tmp_path_factory.mktemp("older")
    make_tiny_model(out / "model", tied=True, seed=5)
    launch(SCRIPT, out, "further", ranks=2, timeout_s=480)
    return out


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run folders of split.py whose responses come in parts."""
    out = tmp_path_factory.mktemp("parts")
    make_tiny_model(out / "model", tied=True, seed=5)
    launch(SCRIPT, out, "parts", ranks=2, timeout_s=480)
    return out


def test_taking_turns_is_the_run_of_one_side(runs: Path) -> None:
    assert_same_run(runs / "turns", runs / "one", range(2))
    assert curve(runs / "turns") == curve(runs / "one")
    assert "evaluation/sums" in curve(runs / "turns")[1]
    for iteration in range(2):
        assert versions(runs / "turns", iteration) == {iteration}
    generated, learned = spans(runs, "turns", "generators"), spans(runs, "turns", "trainers")
    assert generated[0][1] <= learned[0][0] <= learned[0][1] <= generated[1][0] <= generated[1][1] <= learned[1][0]


def test_every_update_is_a_fresh_engine(runs: Path) -> None:
    assert json.loads((runs / "turns.updates.json").read_text()) == {"equal": [True] * 3, "differ": True}


def test_turns_resume_bit_for_bit(runs: Path) -> None:
    assert_same_run(runs / "turns_resumed", runs / "turns", range(1, 2))
    assert curve(runs / "turns_resumed") == curve(runs / "turns")[1:]


def test_generation_overlaps_training(runs: Path) -> None:
    generated, learned = spans(runs, "ahead", "generators"), spans(runs, "ahead", "trainers")
    for iteration in range(3):
        begin, end = generated[iteration + 1]
        assert begin < learned[iteration][1] and learned[iteration][0] < end
    assert [versions(runs / "ahead", iteration) for iteration in range(4)] == [{0}, {0}, {1}, {2}]
    # The first iteration's responses are those of a run without staleness, the third's are not.
    assert curve(runs / "ahead")[0]["reward/mean"] == curve(runs / "turns")[0]["reward/mean"]
    assert curve(runs / "ahead")[0]["rollout/mismatch_max"] <= 1e-4 < curve(runs / "ahead")[2]["rollout/mismatch_max"]


def test_a_killed_run_goes_on_with_what_was_generated_ahead(runs: Path) -> None:
    assert_same_run(runs / "killed", runs / "ahead", range(4))
    assert curve(runs / "killed") == curve(runs / "ahead")


def test_prompts_chosen_by_rewards_are_those_of_one_side(older: Path) -> None:
    assert_same_run(older / "chosen", older / "chosen_one", range(3))
    lines = curve(older / "chosen")
    assert lines == curve(older / "chosen_one")
    assert sum(line["data/replayed_prompts"] for line in lines) > 0


def test_prompts_chosen_ahead_resume_bit_for_bit(older: Path) -> None:
    lines = curve(older / "chosen_ahead")
    assert curve(older / "chosen_ahead_resumed") == lines[3:]
    assert_same_run(older / "chosen_ahead_resumed", older / "chosen_ahead", range(3, 5))
    assert sum(line["data/replayed_prompts"] for line in lines) > 0
    # Only rewards from before the checkpoint have the resumed run skip a turn of its first iteration.
    assert lines[3]["data/skipped_turns"] > 0


def test_generation_runs_two_iterations_ahead(older: Path) -> None:
    assert [versions(older / "further", iteration) for iteration in range(5)] == [{0}, {0}, {0}, {1}, {2}]
    ages = [line["rollout/staleness_mean"] for line in curve(older / "further")]
    assert ages == [0, 1, 2, 2, 2]
    assert_same_run(older / "further_resumed", older / "further", range(3, 5))
    assert curve(older / "further_resumed") == curve(older / "further")[3:]


def test_responses_go_on_under_weights_that_come_in_their_middle(older: Path) -> None:
    for iteration, line in enumerate(curve(older / "in_flight")):
        newest = max(iteration - 1, 0)
        assert versions(older / "in_flight", iteration) <= set(range(max(iteration - 2, 0), newest + 1))
        shares = [line[f"rollout/staleness_share/{age}"] for age in range(3)]
        assert line["rollout/staleness_mean"] == pytest.approx(shares[1] + 2 * shares[2])
    assert any(len(set(response.tolist())) == 2 for response in response_versions(older / "in_flight"))
    assert_same_run(older / "in_flight_resumed", older / "in_flight", range(3, 5))
    assert curve(older / "in_flight_resumed") == curve(older / "in_flight")[3:]


def test_responses_begin_again_where_those_that_were_ahead_are_lost(older: Path) -> None:
    assert [versions(older / "in_flight_lost", iteration) for iteration in (3, 4)] == [{3}, {3}]


def test_one_part_is_the_run_without_parts(streamed: Path) -> None:
    assert_same_run(streamed / "one_part", streamed / "whole", range(2))
    assert curve(streamed / "one_part") == curve(streamed / "whole")


def test_parts_learn_what_the_iteration_does(streamed: Path) -> None:
    assert_same_but_for_rounding(streamed, "parts")
    assert curve(streamed / "parts")[0]["response/failed_prompts"] == 1


def assert_same_but_for_rounding(out: Path, name: str) -> None:
    """Compare a run with ``whole``: its first responses bit for bit, what follows from them within 1e-5."""
    ours, theirs = rollouts(out / name, 0), rollouts(out / "whole", 0)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(a, b) for key in ours for a, b in zip(ours[key], theirs[key], strict=True))
    one, two = curve(out / name)[0], curve(out / "whole")[0]
    assert one.keys() == two.keys()
    assert one == pytest.approx(two, rel=1e-5, abs=1e-7)
    one_weights, two_weights = (first_weights(out / run) for run in (name, "whole"))
    assert all(np.allclose(one_weights[key], two_weights[key], rtol=0, atol=2e-6) for key in two_weights)


def first_weights(run: Path) -> dict[str, np.ndarray]:
    """Return the policy's weights after the first iteration."""
    tensors: dict[str, np.ndarray] = load_file(run / "checkpoints/step_000001/policy/model.safetensors")
    return tensors


def test_gradients_of_a_part_are_computed_while_others_are_generated(streamed: Path) -> None:
    learned, generated = (
        json.loads((streamed / f"parts.{side}.parts.json").read_text()) for side in ("trainers", "generators")
    )
    assert [what for what, _ in learned] == ["part", "part", "part", "step"] * 2
    engine_steps = [moment for _, moment in generated]
    for iteration in range(2):
        moments = [moment for _, moment in learned[4 * iteration : 4 * iteration + 4]]
        # The engine goes on when the gradients of the first part begin, and not when those of the last do.
        before = learned[4 * iteration - 1][1] if iteration else 0.0
        steps = [moment for moment in engine_steps if before < moment < moments[3]]
        assert moments[0] < max(steps) < moments[2]


def test_adapters_learn_from_parts_of_a_shared_queue(streamed: Path) -> None:
    """Their reference is the policy without them, and its gradients stay where all else is offloaded."""
    lines = curve(streamed / "shared")
    assert len(lines) == 2 and lines[0]["policy/reference_kl"] == 0 < lines[1]["policy/reference_kl"]


def test_a_signal_between_parts_ends_both_sides(streamed: Path) -> None:
    assert [(streamed / f"stopped.{side}.txt").read_text() for side in ("trainers", "generators")] == ["75", "75"]
    # The next start draws the iteration once more.
    assert_same_run(streamed / "stopped", streamed / "parts", range(2))
    assert curve(streamed / "stopped") == curve(streamed / "parts")


def test_a_rehearsal_measures_both_sides(runs: Path) -> None:
    (stage,) = json.loads((runs / "rehearsed/rehearsal.json").read_text())
    # The same prompts as those of a run's first iteration, where some responses stop by themselves.
    first = curve(runs / "turns")[0]
    assert stage["length"] > first["response/length"] and first["response/stopped"] > 0
    assert stage["rollout_peak_gib"] > 0 and stage["peak_gib"] > 0 and {"update", "rollout"} <= stage["seconds"].keys()


def test_a_signal_to_a_generator_ends_both_sides(runs: Path) -> None:
    assert [(runs / f"stopped.{side}.txt").read_text() for side in ("trainers", "generators")] == ["75", "75"]
    assert [path.name for path in (runs / "stopped/checkpoints").glob("step_*")] == ["step_000001"]


def test_a_signal_to_a_trainer_drops_what_is_generated_ahead(runs: Path) -> None:
    assert [(runs / f"stopped_ahead.{side}.txt").read_text() for side in ("trainers", "generators")] == ["75", "75"]
    assert [line["step"] for line in curve(runs / "stopped_ahead")] == [0, 1, 2, 3]
    # The next start draws the third iteration once more, by the newest weights.
    assert [versions(runs / "stopped_ahead", iteration) for iteration in range(4)] == [{0}, {0}, {2}, {2}]
    assert curve(runs / "stopped_ahead")[0] == curve(runs / "ahead")[0]


def test_an_error_of_a_generator_ends_both_sides(runs: Path) -> None:
    sentences = [(runs / f"refused.{side}.txt").read_text() for side in ("trainers", "generators")]
    assert sentences[0] == sentences[1]
    assert sentences[0].startswith("RolloutError: 0 of 4 prompts were answered") and "takes no prompt" in sentences[0]


@pytest.mark.skipif(not WHOLE, reason="OVR_TEST_WHOLE is not set")
@pytest.mark.parametrize("part", ["tp1", "tp2"])
def test_two_ranks_on_either_side(part: str, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model", tied=True, seed=5)
    launch(SCRIPT, tmp_path, part, ranks=4)
    assert_same_run(tmp_path / "turns", tmp_path / "one", range(2))
    assert curve(tmp_path / "turns") == curve(tmp_path / "one")
    for name in ("sampled", "tail"):
        assert_same_run(tmp_path / name, tmp_path / f"{name}_one", range(3))
        assert curve(tmp_path / name) == curve(tmp_path / f"{name}_one")
    assert_same_run(tmp_path / "ahead_resumed", tmp_path / "ahead", range(2, 4))
    assert [versions(tmp_path / "ahead", iteration) for iteration in range(4)] == [{0}, {0}, {1}, {2}]
    assert_same_but_for_rounding(tmp_path, "parts")
    assert any(len(set(response.tolist())) == 2 for response in response_versions(tmp_path / "in_flight"))
    assert_same_run(tmp_path / "in_flight_resumed", tmp_path / "in_flight", range(3, 5))
    assert curve(tmp_path / "in_flight_resumed") == curve(tmp_path / "in_flight")[3:]
    # Without the archive of the responses that were generated ahead newer weights draw them again.
    assert [versions(tmp_path / "ahead_lost", iteration) for iteration in (2, 3)] == [{2}, {2}]
