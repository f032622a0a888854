"""Source files at URLs, in fsspec's file system in memory."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest

from ovr_megatron.config import ConfigError, SourceConfig
from ovr_megatron.data.schema import RowError
from ovr_megatron.data.sources import open_source
from ovr_megatron.data.streamed import StreamedRows


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/bucket", recursive=True)


def lines(*texts: str) -> bytes:
    rows = [{"messages": [{"role": "user", "content": text}], "answer": "1"} for text in texts]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_files_elsewhere_are_read_like_those_on_the_disk(store: Any, tmp_path: Path) -> None:
    for state in ("old", "newer"):
        store.pipe("/bucket/train/rows.jsonl", lines(state, "second"))
        rows = open_source(SourceConfig(path="memory://bucket/train/rows.jsonl"))
        assert [rows[i].messages[0].text for i in range(len(rows))] == [state, "second"]
    assert rows[0].source == "train/rows"
    (tmp_path / "rows.jsonl").write_bytes(lines("local"))
    assert open_source(SourceConfig(path=f"file://{tmp_path}/rows.jsonl"))[0].messages[0].text == "local"


def test_a_file_elsewhere_is_streamed(store: Any, tmp_path: Path) -> None:
    store.pipe("/bucket/rows.jsonl", lines("a", "b", "c"))
    stream = StreamedRows(SourceConfig(path="memory://bucket/rows.jsonl", streaming=True), "1")
    assert sorted(row.messages[0].text for row in islice(stream, 3)) == ["a", "b", "c"]


def test_what_cannot_be_reached_is_named(store: Any) -> None:
    store.pipe("/bucket/rows.jsonl", lines("a"))
    with pytest.raises(RowError, match=r"memory://bucket/none.jsonl: cannot be read .*none.jsonl"):
        open_source(SourceConfig(path="memory://bucket/none.jsonl"))
    for path, message in (
        ("s3://bucket/rows.jsonl", r"s3:// needs the package s3fs; pip install s3fs"),
        ("nothing://rows.jsonl", r"the protocol nothing:// is not known"),
        ("zip://a.jsonl::memory://bucket/a.zip", r"a chain of protocols is not read"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_source(SourceConfig(path=path))
        with pytest.raises(ConfigError, match=message):
            StreamedRows(SourceConfig(path=path, streaming=True), "1")
    with pytest.raises(ConfigError, match="is a URL; give a folder"):
        SourceConfig(path="rows.jsonl", image_root="s3://bucket/images")
