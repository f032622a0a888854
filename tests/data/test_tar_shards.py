"""Tar shards as sources: keys, images, random access without extraction, and what is refused."""

import io
import json
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from ovr_megatron.config import DataConfig, SourceConfig
from ovr_megatron.data import tar_shards
from ovr_megatron.data.images import load_media
from ovr_megatron.data.schema import Row, RowError, RowSource
from ovr_megatron.data.sources import open_source
from ovr_megatron.data.streamed import StreamedRows

NAME = Path(__file__).stem


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), colour).save(buffer, "PNG")
    return buffer.getvalue()


def ask(text: str, **more: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": text}], "answer": "1", **more}).encode()


def write(path: Path, *members: tuple[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def opened(path: object, **settings: Any) -> RowSource:
    return open_source(SourceConfig(path=str(path), **settings))


def colours(row: Row, **limits: int) -> list[tuple[int, ...]]:
    images, videos = load_media(row, DataConfig(**limits))
    return [image.getpixel((0, 0)) for image in [*images, *(frame for video in videos for frame in video)]]


RED, GREEN, BLUE = (255, 0, 0), (0, 128, 0), (0, 0, 255)


def test_members_of_a_key_are_a_row(tmp_path: Path) -> None:
    for i in range(3):
        write(
            tmp_path / f"shard-{i:03}.tar",
            ("a/0.json", ask(f"{i} <image>?")),
            ("a/0.png", picture("red")),
            ("1.0.png", picture("green")),
            ("1.1.PNG", picture("blue")),
            ("1.json", ask("two?", source="mine")),
            ("2.json", ask("<image> before <image>?", images=["2.b.png", "2.a.png"])),
            ("2.a.png", picture("red")),
            ("2.b.png", picture("blue")),
        )
    source = opened(tmp_path / "shard-{000..001}.tar")
    assert len(source) == 6 and len(opened(tmp_path)) == 9
    rows = [source[i] for i in range(6)]
    assert rows[3].where == f"{tmp_path}/shard-001.tar:a/0"
    assert rows[3].messages[0].text == "1 ?" and colours(rows[3]) == [RED]
    assert colours(rows[1]) == [GREEN, BLUE] and rows[1].source == "mine"
    assert colours(rows[2]) == [BLUE, RED]
    assert {path.suffix for path in tmp_path.iterdir()} == {".tar", ""}, "nothing is extracted"


def caption(row: Any) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": row["images"][0]}, {"type": "text", "text": "Describe."}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": row["txt"]}]


def test_captions_take_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.tar", ("0.png", picture("blue")), ("0.txt", b"A sea."))
    with pytest.raises(RowError, match=r"a.tar:0: row: has only the fields __key__, images, txt"):
        opened(path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    row = opened(path, format=f"{NAME}:caption")[0]
    assert row.response == "A sea." and colours(row) == [BLUE]


def test_the_index_is_written_once_for_each_state_of_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.tar", ("0.json", ask("old?")))
    opened(path)

    def refuse(*_: object) -> None:
        raise AssertionError("the index is in the cache")

    with monkeypatch.context() as context:
        context.setattr(tar_shards, "group_members", refuse)
        assert opened(path)[0].messages[0].text == "old?"
    write(path, ("0.json", ask("a new one?")))
    assert opened(path)[0].messages[0].text == "a new one?"


def test_an_image_over_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = picture("red")
    row = opened(write(tmp_path / "a.tar", ("0.json", ask("?")), ("0.png", data)))[0]
    assert colours(row, max_image_bytes=len(data)) == [RED]
    monkeypatch.setattr("ovr_megatron.data.images.read_slice", None)
    with pytest.raises(RowError, match=r"a.tar:0: images\[0\]: image '0.png' has .* more than data.max_image_bytes"):
        colours(row, max_image_bytes=len(data) - 1)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            [("0.json", ask("?", images=["../../etc/passwd.png"]))],
            r"a.tar:0: images: '../../etc/passwd.png' is no image",
        ),
        ([("0.json", ask("?", image="/b.png")), ("0.a.png", b"")], "image: '/b.png' is no image of this key; name one"),
        (
            [("0.json", ask("?", images=["0.a.png"])), ("0.a.png", b""), ("0.b.png", b"")],
            "does not name the image '0.b",
        ),
        ([("0.json", b"{")], r"a.tar:0: json: the member '0.json' cannot be decoded"),
        ([("0.json", ask("?", txt="a")), ("0.txt", b"b")], "txt: stands in the JSON and in a member"),
        ([("0.json", ask("?")), ("1.json", ask("?")), ("0.png", b"")], "a.tar:0: has members in several places"),
        ([("0.json", ask("?")), ("0.json", ask("?"))], "a.tar:0: json: has the member '0.json' twice"),
        ([("0.json", ask("?")), ("0.mp4", b"")], "a.tar:0: mp4: holds an image, a video or audio"),
        ([], "a.tar: has no rows"),
    ],
)
def test_what_cannot_be_a_row_is_named(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    path = write(tmp_path / "a.tar", *members)
    with pytest.raises(RowError, match=message):
        opened(path)[0]


def test_shards_that_are_no_plain_tar_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", ("0.json", ask("?")), ("0.png", picture("red")), mode="w:gz")
    with pytest.raises(
        RowError, match=r"a.tar: is no intact tar file .*; write the shard anew, as a tar file that is no"
    ):
        opened(path)
    write(path, ("0.json", ask("?")), ("0.png", bytes(20000)))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(RowError, match=r"a.tar: is no intact tar file"):
        opened(path)
    whole = write(path, *((f"{number}.json", ask("?")) for number in range(5))).read_bytes()
    headers = [start for start in range(0, len(whole), 512) if whole[start + 257 : start + 262] == b"ustar"]
    assert len(headers) == 5
    damaged = whole[: headers[2] + 148] + b"x" + whole[headers[2] + 149 :]  # its checksum
    for content in (whole[: headers[3]], whole[: headers[3] + 100], damaged):
        path.write_bytes(content)
        with pytest.raises(RowError, match=r"a.tar: is no intact tar file \(no end of the archive at byte"):
            opened(path)
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(RowError, match=r"a.tar:0: png: the member '0.png' is a link"):
        opened(path)
    with pytest.raises(RowError, match=r"a-1.tar: there is no such file"):
        write(tmp_path / "a-0.tar", ("0.json", ask("?")))
        opened(tmp_path / "a-{0..1}.tar")
    assert len(opened(tmp_path / "a-{0..0}.tar")) == 1
    with pytest.raises(RowError, match="has a range that ends before it begins"):
        opened(tmp_path / "a-{1..0}.tar")


def test_a_stream_of_shards_has_the_rows_of_the_index(tmp_path: Path) -> None:
    for i in range(2):
        members = []
        for k in range(5):
            members += [(f"{k}.json", ask(f"{i}-{k}")), (f"{k}.png", picture("blue"))]
        write(tmp_path / f"s{i}.tar", *members)
    settings = SourceConfig(path=f"{tmp_path}/s{{0..1}}.tar", streaming=True, shuffle_rows=3)
    by_index = open_source(SourceConfig(path=settings.path))
    expected = {by_index[i].where: by_index[i] for i in range(10)}
    stream = StreamedRows(settings, "1")
    rows = list(islice(stream, 7))
    state = json.loads(json.dumps(stream.state()))
    resumed = StreamedRows(settings, "1")
    resumed.load(state)
    rest = list(islice(resumed, 3))
    assert rest == list(islice(stream, 3))
    assert {row.where: row for row in rows + rest} == expected
    assert colours(rest[0]) == [BLUE]
