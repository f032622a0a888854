"""Streamed sources: every row once an epoch, and the same rows after a resume at any position."""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from ovr_megatron.config import ColdStartConfig, ConfigError, DataConfig, SourceConfig, build
from ovr_megatron.data.images import load_media
from ovr_megatron.data.schema import Row, RowError
from ovr_megatron.data.skipped import SkippedRows
from ovr_megatron.data.sources import open_source
from ovr_megatron.data.stream import RowStream, open_stream, source_length
from ovr_megatron.data.streamed import StreamedRows, StreamError
from ovr_megatron.data_checks import streamed_errors

ROWS = 11  # of each file


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def row(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "answer": "1"}


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    folder = tmp_path / "lines"
    folder.mkdir()
    for name in "ab":
        rows = [json.dumps(row(f"{name}{i}")) for i in range(ROWS)]
        (folder / f"{name}.jsonl").write_text("\n".join([*rows[:3], "", *rows[3:]]) + "\n")
    return folder


@pytest.fixture
def table(tmp_path: Path) -> Path:
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    picture = {"bytes": (tmp_path / "red.png").read_bytes(), "path": None}
    features = datasets.Features(
        messages=datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
        answer=datasets.Value("string"),
        image=datasets.Image(),
    )
    rows = [{**row(f"c{i}"), "image": picture} for i in range(ROWS)]
    path = tmp_path / "c.parquet"
    datasets.Dataset.from_list(rows, features=features).to_parquet(path, batch_size=4)
    return path


def mixture(lines: Path, table: Path, block: int, skipped: SkippedRows | None = None) -> RowStream:
    sources = [
        SourceConfig(path=str(lines), streaming=True, shuffle_rows=block, weight=2),
        SourceConfig(path=str(table), streaming=True, shuffle_rows=block),
        SourceConfig(path=str(lines / "a.jsonl"), name="by index"),
    ]
    return open_stream(DataConfig(sources=sources), 1, skipped)


def texts(rows: Iterator[Row], count: int) -> list[str]:
    return [f"{item.source} {item.messages[0].text}" for item in islice(rows, count)]


@pytest.mark.parametrize("block", [4, 1000])
def test_an_epoch_has_every_row_once_in_an_order_of_its_own(lines: Path, block: int) -> None:
    stream = StreamedRows(SourceConfig(path=str(lines), streaming=True, shuffle_rows=block), "1")
    rows = [item for _ in range(3) for item in islice(stream, 2 * ROWS)]
    epochs = [[item.messages[0].text for item in rows[i : i + 2 * ROWS]] for i in range(0, 6 * ROWS, 2 * ROWS)]
    everything = [f"{name}{i}" for name in "ab" for i in range(ROWS)]
    assert all(sorted(epoch) == sorted(everything) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != everything
    (fourth,) = {item.where for item in rows if item.messages[0].text == "b3"}
    assert fourth == f"{lines}/b.jsonl:5"  # behind the blank line
    assert source_length(stream) is None


def test_a_resumed_mixture_goes_on_with_the_same_rows(lines: Path, table: Path) -> None:
    whole = mixture(lines, table, 4)
    states, expected = [], []
    for _ in range(90):
        states.append(json.dumps(whole.state()))
        expected += texts(whole, 1)
    assert Counter(text.split()[0] for text in expected)["by"] > 10
    for position in range(0, 78, 11):
        resumed = mixture(lines, table, 4)
        resumed.load(json.loads(states[position]))
        assert json.dumps(resumed.state()) == states[position]
        assert texts(resumed, 12) == expected[position : position + 12]
    back = mixture(lines, table, 4)
    texts(back, 50)
    back.load(json.loads(states[20]))  # as packs do, to draw rows again
    assert texts(back, 30) == expected[20:50]


def test_a_position_of_another_stream_is_refused(lines: Path, table: Path) -> None:
    state = mixture(lines, table, 4).state()
    with pytest.raises(ConfigError, match="written with other files, another seed or another shuffle_rows of"):
        mixture(lines, table, 5).load(state)
    (lines / "c.jsonl").write_text(json.dumps(row("new")))
    with pytest.raises(ConfigError, match="written with other files"):
        mixture(lines, table, 4).load(state)


def test_streamed_images_are_those_of_the_table(table: Path) -> None:
    stream = StreamedRows(SourceConfig(path=str(table), streaming=True), "1")
    by_index = open_source(SourceConfig(path=str(table)))
    expected = {by_index[i].where: by_index[i] for i in range(ROWS)}
    for item in islice(stream, ROWS):
        assert item == expected[item.where]
        assert load_media(item, DataConfig())[0][0].getpixel((0, 0)) == (255, 0, 0)


def test_bad_rows_are_listed_and_a_broken_stream_ends(lines: Path, table: Path, tmp_path: Path) -> None:
    with (lines / "a.jsonl").open("a") as file:
        file.write("{bad\n")
    settings = SourceConfig(path=str(lines), streaming=True)
    (error,) = [error for error in streamed_errors(settings, [], 100) if error]
    assert str(error).startswith(f"{lines}/a.jsonl:13: is not JSON")
    with pytest.raises(RowError, match="is not JSON"):
        list(islice(StreamedRows(settings, "1"), 2 * ROWS + 1))
    assert len(texts(mixture(lines, table, 4, SkippedRows()), 90)) == 90
    table.write_bytes(table.read_bytes()[:-20])
    with pytest.raises(StreamError, match=r"c.parquet broke off after 0 rows .*the same command goes on"):
        next(StreamedRows(SourceConfig(path=str(table), streaming=True), "1"))
    (tmp_path / "blank.jsonl").write_text("\n  \n" + (lines / "a.jsonl").read_text().splitlines()[0] + "\n\t\n")
    blank = StreamedRows(SourceConfig(path=str(tmp_path / "blank.jsonl"), streaming=True), "1")
    assert {row.where for row in islice(blank, 2)} == {f"{tmp_path}/blank.jsonl:3"}
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(StreamError, match=r"none.jsonl has no rows"):
        next(StreamedRows(SourceConfig(path=str(tmp_path / "none.jsonl"), streaming=True), "1"))


def test_what_cannot_be_streamed_is_refused(lines: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(RowError, match=r"a \.json cannot be streamed"):
        StreamedRows(SourceConfig(path=str(tmp_path / "a.json"), streaming=True), "1")
    with pytest.raises(ConfigError, match="has no numbered rows, which this command needs"):
        open_source(SourceConfig(path=str(lines), streaming=True))
    with pytest.raises(ConfigError, match="a puzzle is generated; leave streaming out"):
        SourceConfig(path="puzzle:digits", streaming=True)


def test_rules_need_the_name_of_a_stream(lines: Path) -> None:
    named = SourceConfig(path=str(lines), streaming=True, name="mine")
    assert open_stream(DataConfig(sources=[named]), 1).absent_sources(["mine", "other"]) == ["other"]
    unnamed = SourceConfig(path=str(lines), streaming=True)
    assert open_stream(DataConfig(sources=[unnamed]), 1).absent_sources(["unknown"]) == []


def test_settings_that_need_numbered_rows_are_refused_before_the_run() -> None:
    streamed, read = {"path": "a.jsonl", "streaming": True}, {"path": "b.jsonl"}
    values = {"run": {"dir": "r"}, "model": {"path": "m"}, "data": {"sources": [streamed], "pack_tokens": 512}}
    cases = {
        "steps=0 with the streamed source": {"steps": 0},
        "no rows can be held out of the streamed source": {"validation": {"share": 0.1}},
        "validation rows are read by number": {"data": {"sources": [read]}, "validation": {"sources": [streamed]}},
    }
    for message, more in cases.items():
        with pytest.raises(ConfigError, match=message):
            build(ColdStartConfig, values | more)
