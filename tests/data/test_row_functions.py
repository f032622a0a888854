"""A plain function as the format of a source, over files of JSON lines, JSON and parquet."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from ovr_megatron.config import DataConfig, SourceConfig
from ovr_megatron.data.images import load_media
from ovr_megatron.data.schema import Row, RowError, TextPart
from ovr_megatron.data.sources import open_source
from ovr_megatron.runtime.registry import RegistryError

HERE = str(Path(__file__).parent)
NAME = Path(__file__).stem


def ask_riddle(row: Any) -> dict[str, Any]:
    text = row.pop("riddle")  # takes it out: the next reading must have it again
    content = [{"type": "image", "image": picture} for picture in row.get("pictures", [])]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
    return {"messages": messages, "answer": row["solved"], "source": "riddles"}


def list_turns(row: Any) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["riddle"]}, {"role": "assistant", "content": str(row["solved"])}]


def need_place(row: Any, where: str) -> object:
    return row, where


def return_nothing(row: Any) -> None:
    row.clear()


def refuse(row: Any) -> object:
    raise RowError("", "riddle", "is too easy", "remove the row")


def drop_mark(row: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "<image>" + row["riddle"]}], "answer": "1"}


@pytest.fixture(autouse=True)
def in_pythonpath(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def read(path: Path, function: str) -> list[Row]:
    rows = open_source(SourceConfig(path=str(path), format=f"{NAME}:{function}"))
    return [rows[i] for i in range(len(rows)) for _ in range(2)]


RIDDLES = [{"riddle": "What has keys?", "solved": "a piano"}, {"riddle": "2+3?", "solved": 5}]


def test_rows_become_what_the_function_returns(tmp_path: Path) -> None:
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in RIDDLES))
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(RIDDLES))
    for path in (lines, array):
        first, again, second, _ = read(path, "ask_riddle")
        assert first == again
        assert (first.messages[0].parts, first.answer, first.source) == (
            (TextPart("What has keys?"),),
            "a piano",
            "riddles",
        )
        assert second.answer == "5"
        assert read(path, "list_turns")[0].response == "a piano"


def test_a_function_places_images_that_parquet_embeds(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    row = {"riddle": "Colours?", "solved": "red", "pictures": [{"bytes": data, "path": "a.png"}] * 2}
    datasets.Dataset.from_list([row, row]).to_parquet(tmp_path / "structs.parquet")
    datasets.Dataset.from_list([{**row, "pictures": [data] * 2}]).to_parquet(tmp_path / "bytes.parquet")
    for name in ("structs", "bytes"):
        first, *_ = read(tmp_path / f"{name}.parquet", "ask_riddle")
        images, _ = load_media(first, DataConfig())
        assert [image.getpixel((0, 0)) for image in images] == [(255, 0, 0)] * 2


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("ask_riddle", rf"row: {NAME}:ask_riddle raised KeyError in line \d+: 'solved'; correct the function"),
        ("return_nothing", rf"row: {NAME}:return_nothing returned NoneType 'None'; return {{'messages'"),
        ("refuse", "riddle: is too easy; remove the row"),
        ("drop_mark", rf"messages: has 1 marks <image>, .* 0 images \(as {NAME}:drop_mark returned it\); give"),
    ],
)
def test_an_error_names_file_row_and_function(tmp_path: Path, function: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"riddle": "What has keys?"}\n')
    with pytest.raises(RowError, match=rf"^{path}:2: {message}"):
        read(path, function)


def test_a_function_of_other_arguments_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    with pytest.raises(RegistryError, match="is of type function; make it a Format, or a function that takes a row"):
        read(path, "need_place")
