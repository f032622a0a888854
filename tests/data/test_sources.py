"""Opening files, folders, tables and the real data."""

import io
import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from ovr_megatron.config import ConfigError, DataConfig, SourceConfig
from ovr_megatron.data.images import load_media
from ovr_megatron.data.row_parsing import parse_row
from ovr_megatron.data.schema import ImagePart, RowError, RowSource
from ovr_megatron.data.sources import open_source
from ovr_megatron.data_checks import bad_rows

DATA = Path(__file__).resolve().parents[2] / "../shared/data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield


def row(text: str = "2+3?", answer: str = "5", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "answer": answer, **more}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in rows))
    return path


def opened(path: object, **settings: Any) -> RowSource:
    return open_source(SourceConfig(path=str(path), **settings))


def texts(source: RowSource) -> list[str]:
    return [source[i].messages[0].text for i in range(len(source))]


def errors(source: RowSource) -> list[str]:
    """What is wrong with the rows of ``source`` and their images, one sentence each."""
    return [str(error) for error in bad_rows(source, range(len(source)), [lambda row: load_media(row, DataConfig())])]


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_lines_of_different_form_are_read_with_their_numbers(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "second"}]
    many = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}]}
    path = write(
        tmp_path / "rows.jsonl", "\ufeff" + json.dumps(row("first\u2028line")), "", many, row("third", source="s")
    )
    source = opened(path)
    assert texts(source) == ["first\u2028line", "second", "third"]
    assert [source[i].where for i in range(3)] == [f"{path}:1", f"{path}:3", f"{path}:4"]
    assert [source[i].source for i in range(3)] == [f"{tmp_path.name}/rows", f"{tmp_path.name}/rows", "s"]
    assert opened(path, name="mine")[2].source == "mine"
    with pytest.raises(IndexError):
        source[3]


def test_raw_line_separators_do_not_cut_a_row(tmp_path: Path) -> None:
    raw = json.dumps(row("a\u2028b\x85c"), ensure_ascii=False)
    (tmp_path / "rows.jsonl").write_bytes((raw + "\r\n" + raw).encode())
    assert texts(opened(tmp_path / "rows.jsonl")) == ["a\u2028b\x85c"] * 2


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", row("old"))
    assert texts(opened(path)) == ["old"]
    write(path, row("new one"))
    assert texts(opened(path)) == ["new one"]


def test_bad_rows_name_file_and_line_when_they_are_read(tmp_path: Path) -> None:
    source = opened(write(tmp_path / "rows.jsonl", row(), "{bad", json.dumps(row(answer=""))))
    assert source[0].answer == "5"
    with pytest.raises(RowError, match=r"rows.jsonl:2: is not JSON .*'{bad'; write one JSON object a line"):
        source[1]
    with pytest.raises(RowError, match=r"rows.jsonl:3: answer: is missing or empty; "):
        source[2]


def test_a_prompt_may_come_without_an_answer_where_none_is_read(tmp_path: Path) -> None:
    question = {"messages": [{"role": "user", "content": "Which?"}]}
    for raw in (question, question | {"options": ["red", "green"]}):
        assert parse_row(raw, "rows.jsonl:1", tmp_path, needs_answer=False).answer is None
        with pytest.raises(RowError, match="answer: is missing or empty"):
            parse_row(raw, "rows.jsonl:1", tmp_path)
    unknown = question | {"options": ["red", "green"], "answer": "blue"}
    with pytest.raises(RowError, match="'blue' is none of the 2 options"):
        parse_row(unknown, "rows.jsonl:1", tmp_path, needs_answer=False)


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    source = opened(write(tmp_path / "rows.jsonl", row("whole \U0001f600"), row("half \ud83d")))
    assert source[0].messages[0].text == "whole \U0001f600"
    with pytest.raises(RowError, match=r"rows.jsonl:2: messages\[0\].content: has half a character, '\\ud83d'; "):
        source[1]


@pytest.mark.parametrize("name", ["rows[1]", "a*b", "a?b", "a b"])
def test_a_name_is_no_pattern(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a.b.jsonl", row("other"))
    assert texts(opened(write(tmp_path / f"{name}.jsonl", row("mine")))) == ["mine"]


def test_a_damaged_saved_table_is_named(tmp_path: Path) -> None:
    datasets.Dataset.from_list([row()]).save_to_disk(tmp_path / "saved")
    for file in (tmp_path / "saved").glob("*.arrow"):
        file.write_bytes(b"junk")
    with pytest.raises(RowError, match=r"saved: cannot be loaded .*; write the folder anew"):
        opened(tmp_path / "saved")


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(row()).encode() + b"\n\xff\xfe\n")
    with pytest.raises(RowError, match=r"rows.jsonl:2: cannot be read .*; convert the file to UTF-8"):
        opened(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", "", "is empty"),
        ("rows.jsonl", "\n\n", "has no rows"),
        ("rows.json", "[]", "has no rows"),
        ("rows.json", '{"a": 1}', "holds a dict"),
        ("rows.json", '{"a": 1}\n{"a": 2}', "must be named .jsonl"),
        ("rows.parquet", "no table", "cannot be loaded .*; write the file anew"),
        ("rows.csv", "a,b", "unknown suffix"),
        ("rows.jsonl", '{"a": 1}', "has only the fields a"),
    ],
)
def test_a_file_that_holds_no_rows_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RowError, match=message) as caught:
        opened(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("path", ["absent.jsonl", "absent/rows.jsonl", "a/b/c", "absent"])
def test_a_path_that_is_not_there_is_refused(path: str) -> None:
    with pytest.raises(RowError, match=rf"{path}: there is no such file or folder"):
        opened(path)


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RowError, match=r"has no \.jsonl, \.parquet, \.json, \.tar file"):
        opened(tmp_path)


def test_a_hub_name_that_cannot_be_reached_or_is_misspelt() -> None:
    with pytest.raises(RowError, match="nobody/nothing: cannot be loaded"):
        opened("nobody/nothing")
    with pytest.raises(ConfigError, match="'spilt' is not known"):
        opened("nobody/nothing?spilt=test")


def test_a_folder_joins_its_files_in_order(tmp_path: Path) -> None:
    for name in "bac":
        write(tmp_path / f"{name}.jsonl", *(row(f"{name}{i}") for i in range(3)))
    (tmp_path / "README.md").write_text("not data")
    source = opened(tmp_path)
    assert texts(source) == ["a0", "a1", "a2", "b0", "b1", "b2", "c0", "c1", "c2"]
    assert source[4].where == f"{tmp_path / 'b.jsonl'}:2"


def test_parquet_and_saved_tables_keep_images_encoded_until_they_are_used(tmp_path: Path) -> None:
    def raw(data: bytes) -> dict[str, Any]:
        content = [{"type": "image", "text": None, "image": {"bytes": data, "path": None}}]
        content.append({"type": "text", "text": "What?", "image": None})  # type: ignore[dict-item]
        return {"messages": [{"role": "user", "content": content}], "answer": "red"}

    table = datasets.Dataset.from_list([raw(png()), raw(b"broken")])
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "rows.parquet", tmp_path / "saved"):
        source = opened(path)
        assert len(source) == 2
        part = source[0].messages[0].parts[0]
        assert isinstance(part, ImagePart) and part.data == png()
        (error,) = errors(source)
        assert "[1]: messages[0].content[0].image: " in error and "cannot be decoded" in error


def test_the_image_feature_of_the_library_is_not_decoded(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "question": datasets.Value("string")})
    features |= {"options": datasets.List(datasets.Value("string")), "answer": datasets.Value("string")}
    rows = [
        {"image": {"bytes": png(), "path": None}, "question": "Colour?", "options": ["red", "blue"], "answer": "red"}
    ]
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(tmp_path / "rows.parquet")
    source = opened(tmp_path / "rows.parquet")
    part = source[0].messages[0].parts[0]
    assert isinstance(part, ImagePart) and part.data == png()
    assert source[0].answer == "A"


def test_every_bad_row_is_listed(tmp_path: Path) -> None:
    def seeing(name: str) -> dict[str, Any]:
        parts = [{"type": "image", "image": name}, {"type": "text", "text": "?"}]
        return {"messages": [{"role": "user", "content": parts}], "answer": "1"}

    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(png())
    assert errors(opened(write(tmp_path / "good.jsonl", row(), seeing("images/a.png")))) == []
    bad = write(tmp_path / "bad.jsonl", "{", row(), seeing("images/b.png"), row(answer=""))
    lines = errors(opened(bad))
    assert [line.removeprefix(f"{bad}:")[0] for line in lines] == ["1", "3", "4"]
    assert "messages[0].content[0].image: " in lines[1] and "b.png' does not exist" in lines[1]
    outside = opened(write(tmp_path / "up.jsonl", seeing("../images.png")), image_root=str(tmp_path / "images"))
    (line,) = errors(outside)
    assert "up.jsonl:1: " in line and "outside the image root" in line


def test_white_space_is_a_blank_line(tmp_path: Path) -> None:
    source = opened(write(tmp_path / "rows.jsonl", row("first"), "  \t ", "\u00a0", row("second")))
    assert texts(source) == ["first", "second"]
    assert source[1].where.endswith(":4")


def test_the_first_row_may_be_a_bad_one(tmp_path: Path) -> None:
    source = opened(write(tmp_path / "rows.jsonl", "{bad", {"a": 1}, row("good")))
    assert source[2].messages[0].text == "good"
    with pytest.raises(RowError, match=r"rows.jsonl:1: is not JSON"):
        source[0]
    with pytest.raises(RowError, match=r"rows.jsonl:2: messages: is missing"):
        source[1]


def test_a_folder_of_several_splits_is_not_mixed(tmp_path: Path) -> None:
    names = ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001", "gsm_validation")
    for name in names:
        write(tmp_path / f"{name}.jsonl", row(name))
    with pytest.raises(RowError, match=r"has files of several splits: test, train, validation; .*\?split=train"):
        opened(tmp_path)
    assert texts(opened(f"{tmp_path}?split=train")) == list(names[:2])
    assert texts(opened(f"{tmp_path}?split=validation")) == [names[3]]
    with pytest.raises(RowError, match=r"has no file of the split 'tset'; choose one of test, train, validation"):
        opened(f"{tmp_path}?split=tset")
    for path in tmp_path.glob("t*.jsonl"):
        path.unlink()
    assert texts(opened(tmp_path)) == [names[3]]
    write(tmp_path / "more.jsonl", row("more"))  # not named as any split, so it is for training
    with pytest.raises(RowError, match=r"several splits: train, validation"):
        opened(tmp_path)


def test_a_saved_set_of_several_splits_is_not_mixed(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_list([row(name)]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert texts(opened(f"{tmp_path / 'saved'}?split=test")) == ["test"]
    with pytest.raises(RowError, match=r"saved: has files of several splits: test, train"):
        opened(tmp_path / "saved")


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "rows.jsonl", row())
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(RowError, match=r"file/cache: the cache of .* is not writable .*; .* HF_DATASETS_CACHE name"):
        opened(path)


def test_a_full_cache_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *(row("x" * 1000) for _ in range(2000)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(RowError, match=r"cache: the cache of the library datasets is full .*; free space there"):
            opened(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)


def test_puzzles_are_sources(tmp_path: Path) -> None:
    source = opened("puzzle:digits?split=heldout&answered=0&count=3", name="visual")
    assert len(source) == 3
    assert source[0].source == "visual"
    assert errors(source) == []
    with pytest.raises(ConfigError, match="no such kind"):
        opened("puzzle:nothing")


@needs_data
@pytest.mark.parametrize(
    ("name", "count", "images", "first", "source"),
    [
        ("text/math500.json", 500, 0, "\\left( 3, \\frac{\\pi}{2} \\right)", "text/math500"),
        ("text/aime2024.json", 30, 0, "73", "text/aime2024"),
        ("mathvision/testmini.jsonl", 304, 304, "6", "mathvision/testmini"),
        ("puzzlevqa", 600, 600, "C", "puzzlevqa/circle_size_number"),
        ("puzzlevqa/venn.jsonl", 30, 30, "C", "puzzlevqa/venn"),
    ],
)
def test_real_data_is_read_whole(name: str, count: int, images: int, first: str, source: str) -> None:
    rows = opened(DATA / name)
    assert (len(rows), rows[0].answer, rows[0].source) == (count, first, source)
    seen = 0
    for i in range(len(rows)):
        each = rows[i]
        assert each.is_prompt and "\\boxed{}" in each.messages[0].text
        assert all(f"\n({'ABCDE'[k]})" in each.messages[0].text for k in range(len(each.options)))
        found = [part for part in each.messages[0].parts if isinstance(part, ImagePart)]
        assert all(part.path is not None and part.path.is_file() for part in found)
        seen += len(found)
    assert seen == images


@needs_data
def test_real_images_open() -> None:
    assert errors(opened(DATA / "puzzlevqa/size_grid.jsonl")) == []
    assert errors(opened(DATA / "mathvision/testmini.jsonl")) == []
