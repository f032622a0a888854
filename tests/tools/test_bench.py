"""`ovr bench peers` without its peer, and the memory that `ovr bench adapters` measures."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import adapters, peers
from benchmarks.peer_task import OURS, PADDING, PeerTask, reply_lengths, write_rows
from ovr_megatron import cli
from ovr_megatron.config import ParallelConfig
from ovr_megatron.families import ModelShape
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.plan.parameters import model_state


def test_an_absent_peer_is_named_with_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["bench", "peers", "--shapes", "tiny", "--peer", str(tmp_path)])
    assert left.value.code == 2
    message = capsys.readouterr().err
    assert f"{tmp_path} has no TRL" in message
    assert f"pip install --no-deps --target {tmp_path} trl=={peers.TRL_VERSION}" in message


def test_our_side_learns_the_rows_of_each_step(tmp_path: Path) -> None:
    task = PeerTask(kind="sft", who=OURS, rows=3, tokens=8, steps=2, threads=1)
    make_tiny_model(tmp_path / "model")
    write_rows(task, tmp_path)
    row = peers.measure(task, tmp_path, tmp_path)
    # Of a reply its digits and the token that ends it are learned.
    lengths = reply_lengths(task)
    assert row["step_tokens"] == [sum(lengths[first : first + 3]) + 3 for first in (3, 6)]
    assert 5 < row["loss"][0] < 7  # about the logarithm of 448 ids
    assert math.log2(row["peak_bytes"]) > 27
    assert len(row["step_seconds"]) == 2


def test_a_peer_of_another_first_loss_makes_a_comparison_void() -> None:
    ours = {"loss": [6.0], "norm": [2.0], "tokens_per_second": 20.0, "tokens_per_cpu_second": 30.0}
    peer = ours | {"tokens_per_second": 10.0}
    same = peers.compare([ours], [peer], PADDING)
    assert (same["ratio"], same["cpu_ratio"], same["void"]) == (2.0, 1.0, False)
    assert peers.compare([ours], [peer | {"loss": [6.001]}], PADDING)["void"]
    assert peers.compare([ours], [peer | {"norm": [2.001]}], PADDING)["void"]


def test_the_ratio_is_the_median_of_the_rounds() -> None:
    speeds = {"ours": [20.0, 10.0, 30.0], "peer": [10.0, 10.0, 10.0]}  # tokens a second of three rounds
    sides = {}
    for side, rates in speeds.items():
        sides[side] = [{"loss": [], "norm": [], "tokens_per_second": rate, "peak_bytes": 1 << 30} for rate in rates]
    beside = peers.compare(sides["ours"], sides["peer"], PADDING)
    assert beside == {"ratio": 2.0, "ratios": [2.0, 1.0, 3.0]}
    median = peers.median_row(sides["ours"])
    assert median["tokens_per_second"] == 20.0
    assert peers.median_row(sides["ours"][:2])["tokens_per_second"] == 10.0
    line = peers.format_row({"name": "case: TRL", "seconds": 1.0} | median | beside)
    assert line.split()[-3:] == ["2.00", "1.00", "3.00"]


def test_a_round_that_fails_makes_no_ratio() -> None:
    row = {"loss": [], "norm": [], "tokens_per_second": 20.0}
    failed = [row, {"failed": "reason"}]
    assert peers.compare([row, row], failed, PADDING) == {}
    assert peers.median_row(failed) == {"failed": "reason"}


def test_cases_have_the_same_rows_for_both_sides() -> None:
    cases = peers.make_cases(["tiny", "30M"], "equal")
    assert [case.name for case in cases] == ["tiny, SFT, equal lengths", "30M, SFT, equal lengths"]
    for case in cases:
        assert reply_lengths(case.task) == reply_lengths(replace(case.task, who=PADDING))
        assert set(reply_lengths(case.task)) == {case.task.tokens}


def test_a_critic_beside_a_policy_takes_no_second_base(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model", tied=False, seed=1)
    one, two = (
        adapters.measure_memory(part, "tiny", tmp_path)["weight_bytes"]
        for part in (adapters.ONE_BASE, adapters.TWO_BASES)
    )
    settings = adapters.make_config(tmp_path)
    critic = model_state(ModelShape.from_hf(tmp_path / "model"), settings.model, ParallelConfig(), dp=1, critic=True)
    assert two - one == critic.frozen > 0.4 * two
