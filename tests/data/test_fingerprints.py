"""Fingerprints: what they see, what they do not, and their file."""

import io
from pathlib import Path

import pytest
from PIL import Image

from ovr_megatron.config import ConfigError, DataConfig
from ovr_megatron.data.fingerprints import fingerprint, read_fingerprints, write_fingerprints
from ovr_megatron.data.schema import ImagePart, Message, Part, Row, RowError, TextPart

RED = ImagePart(image=Image.new("RGB", (30, 20), "red"))
ASK = TextPart("How  many\n?")


def row(*parts: Part, response: str | None = None, **fields: object) -> Row:
    messages = [Message("user", parts)]
    if response is not None:
        messages.append(Message("assistant", (TextPart(response),)))
    return Row(tuple(messages), **fields)  # type: ignore[arg-type]


def file_part(format: str) -> ImagePart:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(buffer, format)
    return ImagePart(data=buffer.getvalue())


def test_only_the_prompt_counts() -> None:
    known = fingerprint(row(RED, ASK))
    assert len(known) == 64
    assert fingerprint(row(RED, TextPart(" How many ?"), answer="1", source="s", id="i", where="f:1")) == known
    assert fingerprint(row(RED, ASK, response="One.")) == known
    assert fingerprint(row(file_part("PNG"), ASK)) == fingerprint(row(file_part("BMP"), ASK)) == known


def test_every_difference_of_the_prompt_counts() -> None:
    dotted = Image.new("RGB", (30, 20), "red")
    dotted.putpixel((29, 19), (254, 0, 0))
    turned = Image.new("RGB", (20, 30), "red")
    rows = [
        row(RED, ASK),
        row(ASK),
        row(RED, TextPart("How many")),
        row(RED, RED, ASK),
        row(ImagePart(image=dotted), ASK),
        row(ImagePart(image=turned), ASK),
        Row((Message("system", (ASK,)), Message("user", (RED,)))),
    ]
    assert len({fingerprint(each) for each in rows}) == len(rows)


def test_the_limits_of_images_hold() -> None:
    with pytest.raises(RowError, match="max_image_pixels"):
        fingerprint(row(RED, ASK), DataConfig(max_image_pixels=10))


def test_the_file_gives_back_what_was_written(tmp_path: Path) -> None:
    rows = [row(ASK), row(RED, ASK), row(ASK)]
    path = tmp_path / "deep/exclude.txt"
    assert write_fingerprints(rows, path) == 2
    assert read_fingerprints(path) == {fingerprint(each) for each in rows}
    path.write_text("\n" + path.read_text().upper() + "\n")
    assert read_fingerprints(path) == {fingerprint(each) for each in rows}


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_fingerprints(tmp_path / "absent.txt")
    (tmp_path / "bad.txt").write_text("a" * 64 + "\nhello\n")
    with pytest.raises(ConfigError, match=r"bad.txt:2: 'hello' is not a SHA-256"):
        read_fingerprints(tmp_path / "bad.txt")
