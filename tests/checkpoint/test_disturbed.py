"""Runs that are killed, stopped, starved or started twice end as the undisturbed one; see `disturbed.py`."""

import datetime
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from transformers import Qwen2_5_VLForConditionalGeneration

from ovr_megatron.checkpoint import store
from ovr_megatron.checkpoint.manifest import check, read_manifest
from ovr_megatron.config import ParallelConfig
from ovr_megatron.runtime import distributed
from ovr_megatron.runtime.distributed import World
from tests.ranks import launch

pytestmark = pytest.mark.both_cores

LAUNCHER = Path(__file__).with_name("disturbed.py")
KILLS = 1  # of each stage; tests/soak/kills.py has twenty
CLOCKS = ("timing/", "perf/", "memory/")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every day other moments; ``KILL_SEED`` repeats those of a day."""
    out = tmp_path_factory.mktemp("disturbed")
    seed = int(os.environ.get("KILL_SEED", datetime.date.today().toordinal())) * KILLS
    launch(LAUNCHER, out, seed, KILLS, ranks=0, timeout_s=3000)
    return out


@pytest.fixture
def codes(runs: Path) -> dict[str, Any]:
    return json.loads((runs / "results.json").read_text())


def curve(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics/train.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(CLOCKS)} for line in lines]


def last(run: Path) -> Path:
    return run / "checkpoints/step_000006"


def assert_same(run: Path, whole: Path) -> None:
    """Weights, moments, cursors and generators bit for bit, and every number of the curve."""
    assert check(last(run)).files == read_manifest(last(whole)).files
    assert read_manifest(last(run)).extra == read_manifest(last(whole)).extra
    assert curve(run) == curve(whole)
    assert not list((run / "checkpoints").glob(".*"))


def test_an_undisturbed_run(runs: Path, codes: dict[str, Any]) -> None:
    assert codes["whole"] == [0, 0]
    assert [line["step"] for line in curve(runs / "whole")] == list(range(6))
    assert sorted(path.name for path in (runs / "whole/checkpoints").iterdir()) == ["step_000004", "step_000006"]
    assert (runs / "whole/spikes.jsonl").read_text() == ""


def test_exports_outlive_their_checkpoints(runs: Path, codes: dict[str, Any]) -> None:
    exports = runs / "whole/exports"
    assert sorted(path.name for path in exports.iterdir()) == ["step_000002", "step_000004", "step_000006"]
    newest = runs / "whole/checkpoints/step_000006/policy/model.safetensors"
    assert (exports / "step_000006/model.safetensors").samefile(newest)
    models = [Qwen2_5_VLForConditionalGeneration.from_pretrained(exports / f"step_00000{step}") for step in (2, 6)]
    weights = [model.model.language_model.layers[0].mlp.down_proj.weight for model in models]
    assert not torch.equal(*weights)


@pytest.mark.parametrize(("kills", "whole"), [("kills", "whole"), ("rl_kills", "rl_whole"), ("way_kills", "way_whole")])
def test_killed_runs_go_on_as_if_nothing_had_been(runs: Path, codes: dict[str, Any], kills: str, whole: str) -> None:
    assert codes[whole] == [0, 0]
    assert len(codes[kills]) == KILLS
    for kill in codes[kills]:
        assert -9 in kill["killed"] and 0 not in kill["killed"], kill
        assert kill["resumed"] == [0, 0], kill
        assert_same(runs / kill["run"], runs / whole)


def test_background_writing_gives_the_same_bytes(runs: Path, codes: dict[str, Any]) -> None:
    assert codes["sync"] == [0, 0]
    assert_same(runs / "sync", runs / "whole")


def test_a_signal_to_one_rank_saves_and_asks_for_a_requeue(runs: Path, codes: dict[str, Any]) -> None:
    assert (codes["usr1"], codes["term"], codes["signals"]) == ([75, 75], [75, 75], [0, 0])
    assert_same(runs / "signals", runs / "whole")


def test_a_second_job_on_the_folder_is_refused(runs: Path, codes: dict[str, Any]) -> None:
    assert (codes["second"], codes["first"]) == ([2, 2], [0, 0])
    assert "is in use by process " in (runs / "locked_second.log").read_text()
    assert_same(runs / "locked", runs / "whole")


def test_a_run_that_hangs_ends_with_the_stacks_of_every_rank(runs: Path, codes: dict[str, Any]) -> None:
    assert codes["hang"] == [1, 1]
    stacks = [(runs / f"hang/logs/stacks_rank_{rank}.txt").read_text() for rank in range(2)]
    assert all("coldstart/training.py" in text for text in stacks)
    assert "disturbed.py" in stacks[1] and "<lambda>" in stacks[1]
    assert "all_reduce" in stacks[0] or "finish_grad_sync" in stacks[0]
    log = (runs / "hang.log").read_text()
    assert re.search(r"^hang: rank 1 on \S+ has made no progress for run.hang_timeout_s=15 s, at ", log, re.MULTILINE)
    assert f"its stacks are in {runs}/hang/logs/stacks_rank_1.txt; it ends with code 1" in log


def test_a_run_that_hangs_before_its_first_step_ends_too(runs: Path, codes: dict[str, Any]) -> None:
    assert codes["hang_in_start"] == [1, 1]
    assert "hang: rank 1 on " in (runs / "hang_in_start.log").read_text()
    assert "<lambda>" in (runs / "hang_in_start/logs/stacks_rank_1.txt").read_text()


def test_an_iteration_longer_than_the_limit_whose_steps_are_shorter_is_no_hang(
    runs: Path, codes: dict[str, Any]
) -> None:
    assert codes["slow"] == [0, 0], (runs / "slow.log").read_text()[-3000:]
    seconds = [json.loads(line) for line in (runs / "slow/metrics/train.jsonl").read_text().splitlines()]
    assert seconds[1]["timing/generate"] > 25, "the limit is 20 s"
    assert not list((runs / "slow").glob("logs/stacks*"))


@pytest.mark.parametrize(
    ("run", "ranks", "sentence"),
    [
        ("absent", 1, "rank 1 of 2 did not start within 4 s"),
        ("elsewhere", 2, "cannot resolve MASTER_ADDR=no-such-host.invalid"),
    ],
)
def test_ranks_that_do_not_meet_end_with_a_sentence(
    runs: Path, codes: dict[str, Any], run: str, ranks: int, sentence: str
) -> None:
    assert codes[run] == [1] * ranks
    log = (runs / f"{run}.log").read_text()
    assert re.search(f"^error: .*{re.escape(sentence)}", log, re.MULTILINE) and "Traceback" not in log


def test_ppo_is_left_in_the_middle_of_an_iteration_and_goes_on_bit_for_bit(runs: Path, codes: dict[str, Any]) -> None:
    left = codes["left"]
    assert [left[name] for name in ("first", "saved", "unsaved", "update")] == [[75, 75]] * 4
    assert left["end"] == [0, 0]
    assert_same(runs / "left", runs / "rl_whole")
    assert not (runs / "left_first").exists(), "no iteration was finished"
    for name, steps in {"saved": [2], "unsaved": [3], "update": [4, 5]}.items():
        checkpoints = sorted((runs / f"left_{name}").iterdir())
        assert [int(path.name[5:]) for path in checkpoints] == steps
        for path in checkpoints:
            usual = read_manifest(runs / "rl_whole/checkpoints" / path.name)
            assert (read_manifest(path).files, read_manifest(path).extra) == (usual.files, usual.extra)


def test_an_evaluation_that_was_left_is_made_up_for(runs: Path, codes: dict[str, Any]) -> None:
    left = codes["left"]
    assert (left["evaluation"], left["evaluated_before"], left["evaluation_end"]) == ([75, 75], False, [0, 0])
    lines = curve(runs / "left_evaluation")
    assert [line["step"] for line in lines if "evaluation/text" in line] == [0, 1]
    assert [line["step"] for line in lines if "reward/mean" in line] == [0, 1]


def test_a_full_disk_costs_one_checkpoint(runs: Path, codes: dict[str, Any]) -> None:
    assert codes["full"] == [0, 0]
    log = (runs / "full.log").read_text()
    assert "the checkpoint of step 2 could not be written: [Errno 28] No space left on device" in log
    assert "Make room in" in log
    assert_same(runs / "full", runs / "whole")


def test_a_full_disk_stops_a_run_that_wants_it(runs: Path, codes: dict[str, Any]) -> None:
    assert codes["full_stop"] == [2, 2]
    assert "error: the checkpoint of step 2 could not be written" in (runs / "full_stop.log").read_text()
    assert list((runs / "full_stop/checkpoints").glob("*")) == []


@pytest.mark.parametrize(("name", "whole"), [("room", "whole"), ("rl_room", "rl_whole")])
def test_a_disk_that_is_full_for_a_while_costs_what_was_being_written(
    runs: Path, codes: dict[str, Any], name: str, whole: str
) -> None:
    assert codes[name] == [0, 0]
    log = (runs / f"{name}.log").read_text()
    assert "metrics/train.jsonl cannot be written (File too large); records wait in memory" in log
    assert "metrics/train.jsonl: written again, nothing is missing" in log
    assert "the checkpoint of step 4 could not be written: [Errno 27] File too large" in log
    assert_same(runs / name, runs / whole)
    (events,) = (runs / name / "tensorboard/train").iterdir()
    reader = EventFileLoader(str(events))
    assert {event.step for event in reader.Load() if event.HasField("summary")} == set(range(6))
    if name == "rl_room":
        kept = sorted(path.stem for path in (runs / name / "rollouts").glob("*.jsonl"))
        assert kept == ["000000", "000001", "000004", "000005"]
        assert sorted(path.parent.name for path in (runs / name / "rollouts").glob("*/iteration.json")) == kept
        assert all(f"the rollouts of iteration {number} are not kept" in log for number in (2, 3))


def test_rollouts_alone_stop_on_a_full_disk_and_go_on(runs: Path, codes: dict[str, Any]) -> None:
    assert (codes["rolled_full"], codes["rolled"]) == ([2, 2], [0, 0])
    log = (runs / "rolled.log").read_text()
    assert "error: the rollouts of iteration 1 could not be written" in log and "Traceback" not in log
    files = sorted((runs / "rolled/rollouts").glob("00000?.jsonl"))
    assert [path.stem for path in files] == ["000000", "000001"]


def test_files_have_the_modes_of_all_others(runs: Path, codes: dict[str, Any]) -> None:
    files = [path for path in (runs / "rolled").rglob("*") if path.is_file()]
    assert len(files) > 5
    assert {path.stat().st_mode & 0o777 for path in files} == {(runs / "results.json").stat().st_mode & 0o777}


def test_weights_that_are_not_finite_are_never_published(runs: Path, codes: dict[str, Any]) -> None:
    assert codes["infinite"] == [2, 2]
    log = (runs / "infinite.log").read_text()
    assert "error: the checkpoint of step 4 is not kept: policy/model.safetensors: " in log
    assert "has values that are not finite. Training has diverged; the newest whole one is that of step 2" in log
    assert [path.name for path in (runs / "infinite/checkpoints").iterdir()] == ["step_000002"]


def test_folders_that_are_no_checkpoints_of_the_run_are_named_and_left_alone(runs: Path, codes: dict[str, Any]) -> None:
    assert codes["folders"] == [0, 0]
    log = (runs / "folders.log").read_text()
    assert "step_000004_backup is not called step_N" in log
    assert "step_000006/manifest.json: format is 2, this version reads 1; it is of a newer version" in log
    assert "step_000900 was averaged or converted and has no state of a run" in log
    assert "step_000800/manifest.json cannot be read" in log
    assert curve(runs / "folders") == curve(runs / "whole")
    names = [path.name for path in (runs / "folders/checkpoints").iterdir()]
    assert {"step_000004_backup", "step_000800", "step_000900", "step_000006.unusable"} <= set(names)


def test_no_usable_checkpoint_is_not_a_fresh_start(runs: Path, codes: dict[str, Any]) -> None:
    assert codes["unusable"] == [2, 2]
    log = (runs / "folders_unusable.log").read_text()
    assert "no checkpoint that this run can go on from: " in log and "Traceback" not in log
    assert "move these folders elsewhere to begin anew" in log


def test_a_folder_of_another_stage_is_refused(runs: Path, codes: dict[str, Any]) -> None:
    assert codes["other_stage"] == [2, 2]
    log = (runs / "whole_other_stage.log").read_text()
    assert "is the folder of another job (SFT, this one is PPO)" in log


def test_changed_settings_are_said_and_the_former_ones_kept(runs: Path, codes: dict[str, Any]) -> None:
    assert "settings changed since its last start (config.1.yaml keeps them): parallel.tp 1 -> 2" in (
        (runs / "other.log").read_text()
    )
    assert (runs / "other/config.1.yaml").read_bytes() == (runs / "whole/config.yaml").read_bytes()
    assert not list((runs / "whole").glob("config.*.yaml"))


def test_a_step_without_finite_gradients_is_skipped_by_every_rank_and_recorded(
    runs: Path, codes: dict[str, Any]
) -> None:
    assert codes["skip"] == [0, 0]
    whole, skipping = curve(runs / "whole"), curve(runs / "skip")
    assert skipping[:3] == whole[:3]
    assert [line["optimizer/skipped"] for line in skipping] == [0, 0, 0, 1, 1, 1]
    assert skipping[3]["loss/train"] == whole[3]["loss/train"]
    assert skipping[4]["optimizer/lr"] == whole[3]["optimizer/lr"]
    (record,) = [json.loads(line) for line in (runs / "skip/spikes.jsonl").read_text().splitlines()]
    assert (record["step"], record["reason"]) == (3, "skipped")
    assert record["documents"] and all(document["where"] for document in record["documents"])
    total = sum(document["loss"] * document["targets"] for document in record["documents"])
    targets = sum(document["targets"] for document in record["documents"])
    assert targets == skipping[3]["data/tokens"]
    assert total / targets == pytest.approx(record["loss"], rel=1e-6)


def test_too_many_skipped_steps_end_the_run_in_a_sentence(runs: Path, codes: dict[str, Any]) -> None:
    assert codes["diverge"] == [2, 2]
    assert "error: 2 steps in a row were skipped after optimizer step 3" in (runs / "diverge.log").read_text()


def test_a_run_goes_on_in_another_layout(runs: Path, codes: dict[str, Any]) -> None:
    assert codes["other"] == [0, 0]
    whole, other = curve(runs / "whole"), curve(runs / "other")
    assert other[:4] == whole[:4]
    assert other[4]["loss/train"] == pytest.approx(whole[4]["loss/train"], rel=1e-6)
    assert other[5]["loss/train"] == pytest.approx(whole[5]["loss/train"], rel=1e-3)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.fixture(scope="module")
def world() -> World:
    return distributed.start(ParallelConfig(), seed=1, threads=1)


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (flip, "policy-exp_avg/model.safetensors", "was changed"),
        (truncate, "policy/model.safetensors", "bytes instead of"),
        (Path.unlink, "manifest.json", "manifest.json does not exist"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_skipped(
    runs: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture, damage: Any, file: str, message: str
) -> None:
    shutil.copytree(runs / "whole/checkpoints", tmp_path / "checkpoints")
    damage(tmp_path / "checkpoints/step_000006" / file)
    found = store.find(tmp_path / "checkpoints", world)
    assert found is not None and found.step == 4
    said = capsys.readouterr().out
    assert f"step_000006/{file}" in said and message in said


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (flip, "policy/model.safetensors", "policy/model.safetensors was changed"),
        (Path.unlink, "policy/model.safetensors", "policy/model.safetensors is missing"),
        (Path.unlink, "manifest.json", "manifest.json does not exist"),
        (shutil.rmtree, "policy", "is a checkpoint without a policy"),
    ],
)
def test_no_run_begins_from_a_damaged_checkpoint(
    runs: Path, world: World, tmp_path: Path, damage: Any, file: str, message: str
) -> None:
    path = tmp_path / "start"
    shutil.copytree(runs / "whole/checkpoints/step_000006", path)
    store.check_weights(path, world)
    damage(path / file)
    with pytest.raises(store.CheckpointError, match=message):
        store.check_weights(path, world)


def test_what_is_kept(tmp_path: Path) -> None:
    for step in range(1, 10):
        (tmp_path / f"step_{step:06d}").mkdir()
    store.prune(tmp_path, keep_last=2, keep_every=3, newest_step=8)  # 9 is none that the run resumed from
    assert [int(path.name[-1]) for path in sorted(tmp_path.iterdir())] == [3, 6, 7, 8, 9]
    store.prune(tmp_path, keep_last=0, newest_step=8)
    assert len(list(tmp_path.iterdir())) == 5
