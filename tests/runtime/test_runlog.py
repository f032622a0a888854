"""Records that are resumed, damaged, and written to a disk that is full for a while."""

import json
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from ovr_megatron.coldstart.step_trainer import format_totals
from ovr_megatron.data.schema import RowError
from ovr_megatron.data.skipped import SkippedRows
from ovr_megatron.runtime import appended
from ovr_megatron.runtime.journal import Journal
from ovr_megatron.runtime.runlog import RunLog
from ovr_megatron.runtime.step_lines import StepLines, read_metrics


def test_a_resumed_record_has_every_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics" / "train.jsonl"
    lines = StepLines(path)
    for step in range(5):
        lines.write(step, {"loss": step / 10})
    lines.close()
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # cut off by a kill
    again = StepLines(path, resume_at=3)
    again.write(3, {"loss": 9.0})
    again.close()
    assert read_metrics(path) == [{"step": s, "loss": loss} for s, loss in enumerate((0.0, 0.1, 0.2, 9.0))]
    assert [entry.name for entry in path.parent.iterdir()] == ["train.jsonl"]


def test_a_timeline_is_written_where_there_is_one_and_resumed_with_the_log(tmp_path: Path) -> None:
    log = RunLog(tmp_path, "train", trackers=["jsonl"])
    log.close()
    assert not (tmp_path / "timeline.jsonl").exists()
    for first, last in ((0, 3), (2, 4)):
        log = RunLog(tmp_path, "train", first, trackers=["jsonl"])
        for step in range(first, last):
            log.timeline(step, {"activities": ["engine"], "ends": [[float(first)]]})
        log.close()
    lines = read_metrics(tmp_path / "timeline.jsonl")
    assert [(line["step"], line["ends"]) for line in lines] == [(0, [[0.0]]), (1, [[0.0]]), (2, [[2.0]]), (3, [[2.0]])]


BAD = [b"\x00" * 40, b'{"step": 1, "loss": 0.', b"null", b"[1, 2]", b'{"loss": 2}', b'{"step": "1"}', b"\xff\xfe"]


@pytest.mark.parametrize("bad", BAD)
def test_a_damaged_line_of_metrics_costs_that_line_only(
    tmp_path: Path, bad: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"step": 0}\n' + bad + b'\n{"step": 2}\n{"step": 3, "lo')
    assert [line["step"] for line in read_metrics(path)] == [0, 2]
    if bad != BAD[5]:
        assert f"{path}:2: damaged, left out" in capsys.readouterr().err
    lines = StepLines(path, resume_at=3)
    lines.write(3, {})
    lines.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 2, 3]


def test_a_damaged_line_of_a_journal_costs_that_result_only(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        for key in range(3):
            journal.add(key, {"text": str(key)})
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\x00\x00\n" + b'{"key": "1"}\n' + b'{"key": -1}\n' + lines[2])
    with Journal(path) as journal:
        assert [entry["key"] for entry in journal] == [0, 2]
        assert (0 in journal, 1 in journal, journal[2]["text"]) == (True, False, "2")


def test_a_damaged_line_of_skipped_rows_costs_that_line_only(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    path.write_bytes(b'{"where": "a:1"}\nhalf\n{"where": "a:2"}\n')
    rows = SkippedRows(path)
    assert rows.count == 2
    rows.add(RowError("a:2", "messages", "is bad", "correct it"))
    rows.add(RowError("a:3", "messages", "is bad", "correct it"))
    assert rows.count == 3 and path.read_bytes().count(b"\n") == 4


@contextmanager
def full_disk(room: int = 0) -> Iterator[None]:
    """No file of this process grows beyond ``room`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_records_wait_while_the_disk_is_full(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, "train")
    log.scalars(0, {"loss": 0.0})
    metrics = tmp_path / "metrics/train.jsonl"
    size = metrics.stat().st_size
    messages = []
    with capfd.disabled(), full_disk(size + 5), pytest.MonkeyPatch.context() as patch:
        patch.setattr(appended.logger, "warning", messages.append)
        for step in (1, 2):
            log.scalars(step, {"loss": float(step)})
            assert metrics.stat().st_size == size, "half a record stays"
        patch.setattr(appended.logger, "warning", messages.append)
    log.scalars(3, {"loss": 3.0})
    log.close()
    assert len(messages) == 2 and "train.jsonl cannot be written (File too large)" in messages[0]
    assert "train.jsonl: written again, nothing is missing" in capfd.readouterr().err
    assert [line["step"] for line in read_metrics(metrics)] == [0, 1, 2, 3]
    (events,) = (tmp_path / "tensorboard/train").iterdir()
    loaded = [event for event in EventFileLoader(str(events)).Load() if event.HasField("summary")]
    assert [(event.step, event.summary.value[0].tag) for event in loaded] == [(step, "loss") for step in range(4)]


def test_what_never_found_room_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(appended.logger, "warning", messages.append)
    monkeypatch.setattr(appended, "WAITING_BYTES", 200)
    lines = StepLines(tmp_path / "train.jsonl")
    with full_disk():
        for step in range(20):
            lines.write(step, {"loss": 0.25})
        assert sum(map(len, lines.file.waiting)) <= 200
        lines.close()
    assert "20 records are lost: File too large" in messages[-1]
    assert (tmp_path / "train.jsonl").read_text() == ""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_real_disk_may_be_full_for_a_while(small_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = RunLog(small_disk, "train")
    padding = {f"padding/{number}": float(number) for number in range(400)}  # more than what is left of a page
    log.scalars(0, padding)
    filler = (small_disk / "filler").open("wb", buffering=0)
    with pytest.raises(OSError, match="No space left"):
        while True:
            filler.write(bytes(1 << 16))
    for step in (1, 2):
        log.scalars(step, padding)
    assert "cannot be written (No space left on device)" in capfd.readouterr().err
    assert [line["step"] for line in read_metrics(small_disk / "metrics/train.jsonl")] == [0]
    filler.truncate(0)
    log.scalars(3, padding)
    log.close()
    filler.close()
    assert "nothing is missing" in capfd.readouterr().err
    assert [line["step"] for line in read_metrics(small_disk / "metrics/train.jsonl")] == [0, 1, 2, 3]
    (events,) = (small_disk / "tensorboard/train").iterdir()
    loaded = [event.step for event in EventFileLoader(str(events)).Load() if event.HasField("summary")]
    assert loaded == [step for step in range(4) for _ in padding]


def test_totals_leave_details_out() -> None:
    assert format_totals({"validation/loss": 0.58, "validation/loss/source/a": 0.5}) == "validation/loss 0.5800"
