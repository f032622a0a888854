"""Figures of the tail: timeline of the ranks, lengths with the cut, idle share, stale tokens, postponed prompts."""

import csv
import io
import json
from pathlib import Path

import pytest
from matplotlib.colors import to_hex

from ovr_megatron import cli
from ovr_megatron.analysis import tail
from ovr_megatron.analysis.experiment import ExperimentError, read_experiment
from ovr_megatron.analysis.figures import draw_figures
from ovr_megatron.analysis.numbers import write_numbers
from ovr_megatron.analysis.tail import draw_ranks, draw_tail, read_timeline, select_iteration
from ovr_megatron.analysis.themes import DARK, LIGHT, NARROW, WIDE
from ovr_megatron.analysis.timelines import MAX_ROWS, colours, drawn_rows

ACTIVITIES = ["draw", "engine", "wait", "grade", "wait", "update", "wait"]


def timeline_line(step: int, ranks: int = 2) -> dict:
    """The first rank is done after 2 s, the last after 4; all are graded at 4.5 and trained at 9 or 10."""
    engine_ends = [2 + 2 * rank / max(ranks - 1, 1) for rank in range(ranks)]
    ends = [[0.25, end, 4.0, 4.5, 4.5, 9.0 + rank % 2, 10.0] for rank, end in enumerate(engine_ends)]
    counts = [0, 3, 5, 2] + 60 * [0]
    if step % 3 == 2:
        counts = [0, 0, 1, 4, 5] + 59 * [0]
    begins = [0.125, *(ranks - 1) * [0.0]]
    line = {"step": step, "activities": ACTIVITIES, "begins": begins, "ends": ends}
    return line | {"lengths": {"width": 10, "counts": counts}}


@pytest.fixture
def tail_dir(experiment_dir: Path) -> Path:
    """An experiment whose RL has a timeline, oversampled rounds and shares of stale tokens."""
    rl = experiment_dir / "rl"
    path = rl / "metrics" / "train.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        step = line["step"]
        line["timing/rollout_idle"] = 0.3 + 0.01 * step
        line["rollout/long_round"] = float(step % 3 == 2)
        line["rollout/postponed_prompts"] = float([2, 4, 0][step % 3])
        line["response/length_max"] = 37.0 if step % 3 != 2 else 48.0
        line["rollout/staleness_share/0"], line["rollout/staleness_share/1"] = 0.75, 0.25
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (rl / "timeline.jsonl").write_text("".join(json.dumps(timeline_line(step)) + "\n" for step in range(60)))
    return experiment_dir


def test_the_timeline_has_a_bar_for_each_activity_of_each_rank(tail_dir: Path) -> None:
    (*_, line) = read_timeline(read_experiment(tail_dir).stages["rl"])
    axes = draw_ranks(line, LIGHT).axes[0]
    bars = {}
    for patch in axes.patches:
        colour = to_hex(patch.get_facecolor())
        activity = next(name for name, value in colours(LIGHT).items() if value == colour)
        bars.setdefault((int(patch.get_y()), activity), []).append((patch.get_x(), patch.get_width()))
    assert (bars[0, "draw"], bars[1, "draw"]) == ([(0.125, 0.125)], [(0.0, 0.25)])
    assert bars[0, "engine"] == [(0.25, 1.75)]
    assert bars[1, "engine"] == [(0.25, 3.75)]
    assert bars[0, "wait"] == [(2.0, 2.0), (4.5, 0.0), (9.0, 1.0)]
    assert bars[1, "update"] == [(4.5, 5.5)]
    assert axes.yaxis_inverted()
    assert axes.get_title() == "RL: iteration 59 by rank"


@pytest.mark.filterwarnings("error")
def test_a_single_rank_has_room_above_the_legend_of_all_activities() -> None:
    line = timeline_line(0, ranks=1)
    line["activities"] = list(tail.ACTIVITIES)
    line["ends"] = [[float(index + 1) for index in range(len(tail.ACTIVITIES))]]
    for width in (WIDE, NARROW):
        draw_ranks(line, LIGHT, width).savefig(io.BytesIO())  # Matplotlib warns where it finds no room


def test_of_many_ranks_some_are_drawn() -> None:
    assert drawn_rows(3) == [0, 1, 2]
    rows = drawn_rows(1024)
    assert (len(rows), rows[0], rows[-1]) == (MAX_ROWS, 0, 1023) and len(set(rows)) == MAX_ROWS
    axes = draw_ranks({**timeline_line(0, ranks=1024)}, LIGHT, NARROW).axes[0]
    assert "64 of 1024" in axes.get_title()
    assert len(axes.patches) == MAX_ROWS * len(ACTIVITIES)


def test_the_tail_has_lengths_with_the_cut_and_what_waits(tail_dir: Path) -> None:
    stage = read_experiment(tail_dir).stages["rl"]
    lengths, idle, staleness, queue = draw_tail(stage, read_timeline(stage), DARK).axes
    labels = [patch.get_label() for patch in lengths.patches]
    assert labels == ["short round, iteration 58", "long round, iteration 59"]
    values, edges, _ = lengths.patches[0].get_data()
    assert list(values[:4]) == [0, 3, 5, 2] and list(edges[:3]) == [0, 10, 20]
    (cut,) = [line for line in lengths.lines if line.get_gid() == "cut"]
    assert list(cut.get_xdata()) == [37, 37]
    assert idle.lines[0].get_ydata() == pytest.approx([(0.3 + 0.01 * step) / 3 for step in range(60)])
    assert [line.get_label() for line in staleness.lines] == ["0", "1"]
    assert set(staleness.lines[1].get_ydata()) == {0.25}
    assert list(queue.lines[0].get_ydata()) == 20 * [2, 4, 0]


def test_what_a_run_does_not_log_is_not_drawn(tail_dir: Path, finished_dir: Path) -> None:
    names = [chart.name for chart in draw_figures(read_experiment(tail_dir), LIGHT)]
    assert names[names.index("rl_health") + 1 :][:2] == ["rl_timeline", "rl_tail"]
    (tail_dir / "rl/timeline.jsonl").unlink()
    stage = read_experiment(tail_dir).stages["rl"]
    assert len(draw_tail(stage, [], LIGHT).axes) == 3
    assert not {"rl_timeline", "rl_tail"} & {chart.name for chart in draw_figures(read_experiment(finished_dir), LIGHT)}


def test_an_iteration_is_chosen_and_its_numbers_are_written(tail_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {path.stem: path for path in write_numbers(read_experiment(tail_dir, iteration=7))}
    rows = list(csv.DictReader(paths["rl_timeline"].open()))
    assert {row["step"] for row in rows} == {"7"} and len(rows) == 2 * len(ACTIVITIES)
    assert rows[1] == {"step": "7", "rank": "0", "activity": "engine", "begin": "0.25", "end": "2.0"}
    rows = list(csv.DictReader(paths["rl_lengths"].open()))
    assert rows[0] == {"step": "0", "from": "10", "below": "20", "responses": "3"}
    with pytest.raises(ExperimentError, match=r"--iteration 60: timeline\.jsonl has iterations 0 to 59; choose one"):
        select_iteration(read_timeline(read_experiment(tail_dir).stages["rl"]), 60)
    cli.main(["report", str(tail_dir), "--iteration", "7"])
    assert "rl_timeline.png" in capsys.readouterr().out
    page = (tail_dir / "report.html").read_text()
    assert "What each rank does in one iteration." in page and "The tail: lengths of responses" in page
