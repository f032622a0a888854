"""Trackers: added by registration alone, resumed, unreachable, and those of other projects in their offline modes."""

import importlib.util
import json
import os
import sqlite3
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from ovr_megatron.config import ConfigError, RunConfig
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.runtime.runlog import RunLog
from ovr_megatron.runtime.trackers import background, table
from ovr_megatron.runtime.trackers.background import BackgroundTracker, describe
from ovr_megatron.runtime.trackers.protocol import TrackedRun, TrackerError
from ovr_megatron.runtime.trackers.table import check_trackers, open_trackers, register_tracker

ROOT = Path(__file__).resolve().parents[2]


class MemoryTracker:
    """Keeps what it is passed; fails where ``error`` says so."""

    def __init__(self, run: TrackedRun, error: Exception | None = None):
        self.run = run
        self.error = error
        self.calls: list[tuple] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.error:
            raise self.error
        self.calls.append((step, dict(metrics)))

    def log_text(self, step: int, name: str, text: str) -> None:
        self.calls.append((step, name, text))

    def close(self) -> None:
        self.calls.append(("closed",))


@pytest.fixture(autouse=True)
def trackers_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "TRACKERS", replace(table.TRACKERS, rows=dict(table.TRACKERS.rows)))


def test_a_tracker_is_added_by_registration_alone(tmp_path: Path) -> None:
    opened = []

    def open_memory(run: TrackedRun) -> MemoryTracker:
        opened.append(MemoryTracker(run))
        return opened[-1]

    register_tracker("memory", open_memory)
    config = RunConfig(dir=str(tmp_path), trackers=["memory", "jsonl"])
    check_trackers(config.trackers)
    log = RunLog(tmp_path, "train", 4, config.trackers, {"steps": 9})
    values = {"loss/train": 0.5}
    log.scalars(4, values)
    values["loss/train"] = 7.0  # the caller's own afterwards
    log.text(4, "samples/right", "four")
    log.close()
    (tracker,) = opened
    assert tracker.calls == [(4, {"loss/train": 0.5}), (4, "samples/right", "four"), ("closed",)]
    assert (tracker.run.folder, tracker.run.stage, tracker.run.first_step) == (tmp_path, "train", 4)
    assert tracker.run.settings == {"steps": 9}
    assert json.loads((tmp_path / "metrics/train.jsonl").read_text()) == {"step": 4, "loss/train": 0.5}
    assert not (tmp_path / "tensorboard").exists()
    with pytest.raises(TrackerError, match="'memory' is registered already"):
        register_tracker("memory", open_memory)


OUTSIDE = """
import json
import sys

from ovr_megatron.coldstart.__main__ import main
from ovr_megatron.runtime.trackers.table import register_tracker


class Lines:
    def __init__(self, run):
        self.file = (run.folder / "lines.txt").open("a")

    def log(self, step, metrics):
        self.file.write(json.dumps([step, metrics["loss/train"]]) + "\\n")

    def log_text(self, step, name, text):
        pass

    def close(self):
        self.file.write("closed\\n")
        self.file.close()


register_tracker("lines", Lines)
sys.exit(main())
"""


def test_a_run_takes_a_tracker_from_outside_the_package(loaded_python: Path, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model", tied=True, seed=5)
    script = tmp_path / "script.py"
    script.write_text(OUTSIDE)
    settings = ["run.dir=run", "model.path=model", "steps=2", "data.pack_tokens=128", "packs_per_step=1"]
    command = [loaded_python, script, "--config-name", "tiny_cold_start", *settings]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    trackers = "run.trackers=[jsonl,tensorboard,lines]"
    result = subprocess.run([*command, trackers], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics/train.jsonl").read_text().splitlines()]
    *lines, last = (tmp_path / "run/lines.txt").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [[line["step"], line["loss/train"]] for line in metrics]
    assert len(lines) == 2 and last == "closed"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "wandbb",
            r"run.trackers='wandbb' is not known \(did you mean wandb\?\); choose one of jsonl, tensorboard, wandb, "
            "mlflow, trackio, absent, folder, or write package.module:NAME",
        ),
        ("missing_package.module:open", "No module named 'missing_package'; is its folder in PYTHONPATH"),
        ("json:nothing", "has no nothing; correct the name behind the colon"),
        ("json:__name__", "run.trackers=json:__name__ is of type str; make it a function"),
        ("absent", "absent is not installed; pip install 'ovr-megatron\\[absent_package\\]', or leave absent out"),
        ("folder", "folder is not installed"),
    ],
)
def test_a_tracker_that_cannot_be_used_is_refused(
    name: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A folder that has the name of a package, as wandb leaves one in the working directory.
    (tmp_path / "folder_of_records").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    table.TRACKERS.rows["absent"] = table.TrackerKind(MemoryTracker, package="absent_package")
    table.TRACKERS.rows["folder"] = table.TrackerKind(MemoryTracker, package="folder_of_records")
    with pytest.raises(TrackerError, match=sentence):
        check_trackers(["jsonl", name])


def test_a_function_of_a_user_is_a_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_trackers.py").write_text("def open_mine(run):\n    raise ConnectionError('no route to host')\n")
    monkeypatch.syspath_prepend(tmp_path)
    check_trackers(["my_trackers:open_mine"])
    with pytest.raises(TrackerError, match=r"open_mine cannot be started .ConnectionError: no route to host"):
        open_trackers(["my_trackers:open_mine"], TrackedRun(tmp_path, "train"))


def test_a_name_stands_once() -> None:
    with pytest.raises(ConfigError, match="has a name twice"):
        RunConfig(dir="run", trackers=["jsonl", "jsonl"])


def test_a_tracker_that_fails_ends_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVICE_API_KEY", "hidden-0123456789")
    error = ConnectionError("http://me:pass@host/log?write_token=abc of hidden-0123456789 is down\nsecond line")
    tracker = MemoryTracker(TrackedRun(tmp_path, "train"), error)
    thread = BackgroundTracker("memory", tracker)
    for step in range(3):
        thread.log(step, {"loss": 1.0})
    thread.log_text(3, "samples/right", "text")
    thread.close()
    assert tracker.calls == [(3, "samples/right", "text"), ("closed",)], "each call is tried"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: tracker memory: ConnectionError: http://***@host/log?")
    assert "write_token=*** of *** is down; training goes on" in lines[0] and "second" not in lines[0]


def test_a_tracker_that_hangs_delays_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "CLOSE_S", 0.05)
    monkeypatch.setattr(background, "WAITING_CALLS", 5)
    answer = threading.Event()
    tracker = MemoryTracker(TrackedRun(tmp_path, "train"))
    monkeypatch.setattr(tracker, "log", lambda step, metrics: answer.wait())
    thread = BackgroundTracker("memory", tracker)
    for step in range(20):
        thread.log(step, {"loss": 1.0})
    thread.close()
    answer.set()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "tracker memory: it is too slow, and records are lost" in lines[0]
    assert "did not finish within 0.05 s" in lines[1]


def test_only_a_run_that_was_tracked_before_goes_on_without_its_tracker(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def open_nothing(run: TrackedRun) -> MemoryTracker:
        raise TimeoutError("the service does not answer")

    register_tracker("service", open_nothing)
    run = TrackedRun(tmp_path, "train", 3)
    with pytest.raises(TrackerError, match=r"service cannot be started .TimeoutError: the service does not answer"):
        open_trackers(["jsonl", "service"], run)
    run.remember_id("service", "abc")
    assert len(open_trackers(["jsonl", "service"], run)) == 1
    assert "does not answer" in capsys.readouterr().err
    assert (run.id_of("service"), run.id_of("other")) == ("abc", None)
    (tmp_path / "tracker_ids.json").write_text("[")
    with pytest.raises(TrackerError, match=r"tracker_ids.json is damaged; remove it"):
        run.id_of("service")


def test_messages_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdef")
    monkeypatch.setenv("EMPTY_KEY", "")
    assert describe(ValueError("bad hf_abcdef at https://u:p@h/x")) == "ValueError: bad *** at https://***@h/x"


def installed(package: str) -> pytest.MarkDecorator:
    absent = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(absent, reason=f"needs pip install 'ovr-megatron[{package}]'")


# Each start is a process of its own, as a resumed run is.
LOG_TWICE = """
import sys
from pathlib import Path
from ovr_megatron.runtime.runlog import RunLog

name, folder, first = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
log = RunLog(folder, "train", first, [name], {"model": {"path": "m"}, "key": "${oc.env:SECRET}"})
for step in range(first, 3):
    log.scalars(step, {"loss/train": step / 2, "reward/source/a b": 1.0})
log.scalars(first - 1, {"evaluation/text": 0.25})
log.text(2, "samples/right", "1 < 2\\n  indented")
log.close()
"""


def track(name: str, folder: Path, **variables: str) -> str:
    """Log steps 0 to 2, then, as a run resumed from step 1, 1 and 2 again; return what was printed."""
    folder.mkdir()
    environment = os.environ | {"SERVICE_API_KEY": "0123456789" * 4, **variables}
    printed = ""
    for first in ("0", "1"):
        command = [sys.executable, "-c", LOG_TWICE, name, str(folder), first]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0 and "warning: tracker" not in result.stderr, result.stderr[-4000:]
        printed += result.stdout + result.stderr
    return printed


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """Yield the records of wandb's file: LevelDB's log format (``doc/log_format.md`` there) after 7 bytes of header.

    A block has 32 KiB. Each part of a record has a checksum (4 bytes), its length (2) and its kind (1: 4 for a last
    part, 1 for a whole record).
    """
    assert log.startswith(b":W&B")
    offset = 7
    record = b""
    while offset + 7 <= len(log):
        if 32768 - offset % 32768 < 7:  # padding at the end of a block
            offset += 32768 - offset % 32768
            continue
        length, kind = struct.unpack("<HB", log[offset + 4 : offset + 7])
        record += log[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


@installed("wandb")
def test_wandb_writes_one_run_offline(tmp_path: Path) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    key = "0123456789abcdef" * 3
    printed = track("wandb", tmp_path / "run", WANDB_MODE="offline", WANDB_API_KEY=key, WANDB_PROJECT="mine")
    points = []
    runs = set()
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    for path in files:
        for data in leveldb_records(path.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("run"):
                config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                assert config["model"] == {"path": "m"} and config["key"] == "${oc.env:SECRET}"
                runs.add((record.run.run_id, record.run.project, record.run.display_name))
            if record.HasField("history"):
                values = {item.nested_key[0] or item.key: item.value_json for item in record.history.item}
                points += [(int(values["step"]), name) for name in values if "/" in name]
    assert len(files) == 2 and len(runs) == 1
    (run,) = runs
    assert run == (json.loads((tmp_path / "run/tracker_ids.json").read_text())["wandb"], "mine", "run")
    steps = [step for step, name in points if name == "loss/train"]
    assert steps == [0, 1, 2, 1, 2]
    assert [step for step, name in points if name == "evaluation/text"] == [-1, 0]
    assert [step for step, name in points if name == "samples/right"] == [2, 2]
    pages = [path.read_text() for path in (tmp_path / "run").rglob("*.html")]
    assert pages and all("<pre>1 &lt; 2\n  indented</pre>" in page for page in pages)
    assert key not in printed
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or key.encode() not in path.read_bytes(), path


@installed("mlflow")
def test_mlflow_writes_one_run_into_the_run_folder(tmp_path: Path) -> None:
    track("mlflow", tmp_path / "run", MLFLOW_TRACKING_URI="")
    database = sqlite3.connect(tmp_path / "run/mlflow/mlflow.db")
    ((run_id, name, status),) = database.execute("select run_uuid, name, status from runs").fetchall()
    assert run_id == json.loads((tmp_path / "run/tracker_ids.json").read_text())["mlflow"]
    assert (name, status) == ("run", "FINISHED")
    query = "select step, value from metrics where key = ? order by timestamp, step"
    losses = database.execute(query, ("loss/train",)).fetchall()
    assert losses == [(0, 0.0), (1, 0.5), (2, 1.0), (1, 0.5), (2, 1.0)]
    assert {step for step, _ in database.execute(query, ("evaluation/text",))} == {-1, 0}
    (artifacts,) = (tmp_path / "run/mlflow/artifacts").glob("*/artifacts")
    assert (artifacts / "samples/right/000002.txt").read_text() == "1 < 2\n  indented"
    assert "${oc.env:SECRET}" in (artifacts / "config.yaml").read_text()


@installed("trackio")
def test_trackio_writes_one_run_offline(tmp_path: Path) -> None:
    track("trackio", tmp_path / "run", TRACKIO_DIR=str(tmp_path / "trackio"), TRACKIO_PROJECT="mine")
    database = sqlite3.connect(tmp_path / "trackio/mine.db")
    rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in rows} == {json.loads((tmp_path / "run/tracker_ids.json").read_text())["trackio"]}
    metrics = [(step, json.loads(text)) for _, step, text in rows]
    assert [(step, m["loss/train"]) for step, m in metrics if "loss/train" in m][:3] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert [step for step, m in metrics if "loss/train" in m] == [0, 1, 2, 1, 2]
    assert [step for step, m in metrics if "samples/right" in m] == [2, 2]
