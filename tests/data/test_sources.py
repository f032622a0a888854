"""Files of rows: our own form and those of others, and what is said of bad ones."""

import json
from pathlib import Path

import pytest
from PIL import Image

from ovr_megatron.config import DataConfig, SourceConfig
from ovr_megatron.data.images import load_media
from ovr_megatron.data.schema import ImagePart, RowError, parse_row, row_to_json
from ovr_megatron.data.sources import open_source, validate

DATA = Path(__file__).resolve().parents[2].parent / "shared/data"
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")


def write(folder: Path, *rows: object) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def prompt(**changes: object) -> dict:
    return {"messages": [{"role": "user", "content": "2 + 3?"}], "answer": "5"} | changes


def picture(name: str) -> dict:
    parts = [{"type": "image", "image": name}, {"type": "text", "text": "What?"}]
    return prompt(messages=[{"role": "user", "content": parts}])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"messages": [', "JSON"),
        ({"answer": "5"}, "messages"),
        (prompt(answer=None), "answer: is missing"),
        (prompt(answer="x" * 600), "no verifiable final answer"),
        (prompt(answer="E", options=["one", "two"]), "none of the 2 options"),
        (prompt(messages=[{"role": "poet", "content": "x"}]), "role"),
        (picture("absent.png"), "image"),
        (picture("broken.png"), "image"),
        (picture("../outside.png"), "outside the image root"),
        (picture("link.png"), "outside the image root"),
        (picture("/etc/hostname"), "outside the image root"),
        (picture("https://example.org/x.png"), "URL"),
    ],
)
def test_a_bad_row_names_file_line_and_field(tmp_path: Path, row: object, said: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    Image.new("RGB", (30, 30)).save(tmp_path / "outside.png")
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    path = write(root, prompt(), row)
    with pytest.raises(RowError, match=said) as error:
        validate(open_source(SourceConfig(path=str(path), format="messages")), DataConfig())
    assert f"{path}:2" in str(error.value)
    assert ";" in str(error.value)


def test_pictures_over_the_limits_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (400, 300)).save(tmp_path / "a.png")
    source = open_source(SourceConfig(path=str(write(tmp_path, picture("a.png")))))
    assert validate(source, DataConfig()) == 1
    for limit in (DataConfig(max_image_pixels=100_000), DataConfig(max_image_bytes=100)):
        with pytest.raises(RowError, match=r"rows\.jsonl:1"):
            validate(source, limit)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (30, 40)).save(tmp_path / "a.png")
    row = open_source(SourceConfig(path=str(write(tmp_path, picture("a.png")))))[0]
    (image,), _ = load_media(row, DataConfig())
    assert (image.mode, image.size) == ("RGB", (30, 40))


def test_rows_survive_json(tmp_path: Path) -> None:
    Image.new("RGB", (30, 40)).save(tmp_path / "a.png")
    for raw in (prompt(source="s", difficulty=0.5, id="7"), picture("a.png"), prompt(answer="A", options=["x", "y"])):
        row = parse_row(raw, "f:1", tmp_path)
        assert parse_row(json.loads(json.dumps(row_to_json(row))), "f:1", tmp_path) == row


def test_parquet_with_embedded_images(tmp_path: Path) -> None:
    import datasets

    Image.new("RGB", (30, 40), "red").save(tmp_path / "a.png")
    content = [{"type": "image", "image": {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}}]
    rows = [{"messages": [{"role": "user", "content": content}], "answer": "red"}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    source = open_source(SourceConfig(path=str(tmp_path / "rows.parquet")))
    (image,), _ = load_media(source[0], DataConfig())
    assert image.getpixel((0, 0)) == (254, 0, 0) or image.getpixel((0, 0)) == (255, 0, 0)


@real
@pytest.mark.parametrize(
    ("path", "count"), [("text/math500.json", 500), ("text/aime2024.json", 30), ("mathvision/testmini.jsonl", 304)]
)
def test_real_files(path: str, count: int) -> None:
    source = open_source(SourceConfig(path=str(DATA / path)))
    assert len(source) == count
    assert validate(source, DataConfig()) == count
    assert all(source[i].is_prompt and "boxed" in source[i].messages[0].text for i in range(count))


@real
def test_puzzlevqa() -> None:
    source = open_source(SourceConfig(path=str(DATA / "puzzlevqa")))
    assert len(source) == 600
    row = source[0]
    assert any(isinstance(part, ImagePart) for part in row.messages[0].parts)
    assert len(row.options) >= 2 and "(A)" in row.messages[0].text
    for i in range(0, 600, 30):
        load_media(source[i], DataConfig())
