"""Foreign text on a terminal and in a spreadsheet: nothing in it is obeyed."""

import csv
import io
import json
import runpy
from pathlib import Path

import pytest

from ovr_megatron.analysis.experiment import Experiment, Stage
from ovr_megatron.analysis.numbers import write_numbers
from ovr_megatron.data.schema import RowError
from ovr_megatron.runtime.command import run_command
from ovr_megatron.runtime.progress import Progress
from ovr_megatron.runtime.terminal import printable, say

TOOLS = Path(__file__).resolve().parents[2] / "tools"
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\rerased \u202etxt.exe"
STEERING = set("\x1b\x07\x9b\r\u202e")


def test_controls_are_written_out() -> None:
    assert printable("a\tb\nc d \u00fc \u4e09 \U0001f600") == "a\tb\nc d \u00fc \u4e09 \U0001f600"
    text = printable(HOSTILE)
    assert not STEERING & set(text)
    assert text.startswith("\\x1b]0;owned\\x07") and "\\u202etxt.exe" in text
    assert printable("half \ud83d") == "half \\ud83d"
    assert all(len(printable(chr(code))) > 1 for code in (*range(9), 127, 155))


def test_errors_and_progress_cannot_steer_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with Progress(1, HOSTILE, HOSTILE) as progress:
            progress.update(loss=HOSTILE)
        raise RowError(f"{HOSTILE}.jsonl:3", "answer", f"is {HOSTILE}", "correct the row")

    with pytest.raises(SystemExit) as end:
        run_command(work)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("owned") >= 4
    assert not STEERING & set(said)


def test_a_tool_that_shows_rows_cannot_steer_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"id": HOSTILE, "response": "</think>\\boxed{1}", "answer": "2", "correct": True, "source": HOSTILE}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    runpy.run_path(str(TOOLS / "grade.py"))["main"]([str(path)])
    said = capsys.readouterr().out
    assert "owned" in said and not STEERING & set(said)


def test_a_log_that_cannot_be_written_ends_nothing() -> None:
    full = open("/dev/full", "w")
    say("what nobody reads", full)
    with pytest.raises(OSError, match="No space left"):
        full.close()  # tries once more
    say("\u4e09 \ud83d", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))


def test_names_that_read_like_formulas_are_text_in_the_numbers(tmp_path: Path) -> None:
    formula = '=HYPERLINK("http://evil","go")'
    metrics = [{"step": 0, "loss/train": -0.5, f"loss/source/{formula}": 1.0, formula: 2.0, "@SUM(A1)": 3.0}]
    score = {"greedy": {"accuracy": 0.5}, "sources": {formula: {"greedy": {"accuracy": 0.5}}}}
    experiment = Experiment(tmp_path, {"rl": Stage("rl", tmp_path, {}, metrics)}, {"+cmd": {"-2+3": score}}, {}, None)
    cells = [cell for path in write_numbers(experiment) for row in csv.reader(path.open(newline="")) for cell in row]
    assert f"'{formula}" in cells and "'+cmd" in cells and "'-2+3" in cells and "'@SUM(A1)" in cells
    assert [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))] == ["-0.5"]
