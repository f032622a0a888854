"""Opening images within limits."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from ovr_megatron.config import DataConfig
from ovr_megatron.data.images import image_size, load_image, load_media
from ovr_megatron.data.schema import ImagePart, Message, Row, RowError, TextPart, VideoPart

CONFIG = DataConfig()
CASES = Path(__file__).with_name("cases") / "images"
RED = (255, 0, 0)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (30, 20), RED).save(folder / "red.png")
    Image.new("RGB", (30, 20), "blue").save(tmp_path / "secret.png")
    return folder


def part(root: Path, name: str) -> ImagePart:
    return ImagePart(path=root / name, root=root, where="rows.jsonl:3", field="image")


def refused(image: ImagePart, config: DataConfig = CONFIG) -> RowError:
    with pytest.raises(RowError) as caught:
        load_image(image, config)
    assert (caught.value.where, caught.value.field) == (image.where, image.field)
    return caught.value


def test_a_file_inside_its_root_is_opened(root: Path) -> None:
    image = load_image(part(root, "red.png"), CONFIG)
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (30, 20), RED)
    assert load_image(part(root, str(root / "red.png")), CONFIG) == image
    assert load_image(part(root, "../images/red.png"), CONFIG) == image


def test_no_way_leads_out_of_the_root(root: Path) -> None:
    (root / "link.png").symlink_to(root.parent / "secret.png")
    (root / "up").symlink_to(root.parent)
    for name in ("../secret.png", str(root.parent / "secret.png"), "link.png", "up/secret.png", "a/../../secret.png"):
        assert "outside the image root" in refused(part(root, name)).problem


def test_a_root_that_is_a_link_itself_is_fine(root: Path) -> None:
    link = root.parent / "linked"
    link.symlink_to(root)
    assert load_image(part(link, "red.png"), CONFIG).size == (30, 20)


@pytest.mark.parametrize("name", ["absent.png", "", "red.png/x", "zero\0byte", "x" * 300])
def test_a_missing_file_is_named(root: Path, name: str) -> None:
    error = refused(part(root, name))
    assert "does not exist" in error.problem or "no usable path" in error.problem


def test_damaged_files_are_refused(root: Path) -> None:
    noise = encoded(Image.effect_noise((64, 64), 80).convert("RGB"))
    jpeg = encoded(Image.effect_noise((64, 64), 80).convert("RGB"), "JPEG")
    flipped = noise[:200] + bytes([noise[200] ^ 255]) + noise[201:]
    for data in (
        b"",
        b"hello",
        noise[: len(noise) // 2],
        noise[:30],
        jpeg[: len(jpeg) // 2],
        flipped,
        b"%!PS-Adobe-3.0",
    ):
        (root / "damaged.png").write_bytes(data)
        assert "cannot be decoded" in refused(part(root, "damaged.png")).problem
        assert "cannot be decoded" in refused(ImagePart(data=data, where="w", field="f")).problem


def test_limits_hold_and_name_their_setting(root: Path) -> None:
    file, data = part(root, "red.png"), ImagePart(data=(root / "red.png").read_bytes())
    picture = ImagePart(image=Image.new("RGB", (30, 20)))
    size = (root / "red.png").stat().st_size
    for image in (file, data):
        assert "data.max_image_bytes" in refused(image, replace(CONFIG, max_image_bytes=size - 1)).problem
        assert load_image(image, replace(CONFIG, max_image_bytes=size)).size == (30, 20)
    for image in (file, data, picture):
        assert "data.max_image_pixels" in refused(image, replace(CONFIG, max_image_pixels=599)).problem
        assert load_image(image, replace(CONFIG, max_image_pixels=600)).size == (30, 20)
    assert "too elongated" in refused(ImagePart(image=Image.new("RGB", (201, 1)))).problem


def test_the_limit_is_ours_and_not_pillows(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "data.max_image_pixels" in refused(part(root, "red.png"), replace(CONFIG, max_image_pixels=599)).problem
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow refuses twice as many
    assert load_image(part(root, "red.png"), CONFIG).size == (30, 20)


def test_sound_pictures_with_odd_fields_are_read() -> None:
    turned = load_image(ImagePart(data=(CASES / "exif_width_neg.jpg").read_bytes()), CONFIG)
    with Image.open(CASES / "exif_width_neg.jpg") as plain:  # orientation 6
        assert turned == plain.convert("RGB").transpose(Image.Transpose.ROTATE_270)
    commented = load_image(ImagePart(data=(CASES / "bigtext.png").read_bytes()), CONFIG)
    assert commented.size[0] * commented.size[1] > 1


@pytest.mark.parametrize("name", ["float.tif", "int32.tif"])
def test_pixels_of_unknown_range_are_refused(name: str) -> None:
    error = refused(ImagePart(path=CASES / name, root=CASES, where="rows.jsonl:3"))
    assert "has pixels of 32 bits" in error.problem and "convert it to 8 bits" in error.remedy


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_the_header_says_the_size_of_the_picture(format: str) -> None:
    for orientation in range(9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {} if format in ("GIF", "BMP") else {"exif": exif}
        image = ImagePart(data=encoded(Image.new("RGB", (30, 20), RED), format, **options))
        assert image_size(image, CONFIG) == load_image(image, CONFIG).size, orientation
    drawn = ImagePart(image=Image.new("RGB", (30, 20)))
    assert image_size(drawn, CONFIG) == (30, 20)


def test_an_orientation_behind_the_pixels_of_a_png_counts() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (30, 20)), exif=exif)
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    moved = data[:start] + data[end:-12] + data[start:end] + data[-12:]  # before the closing chunk
    assert moved.index(b"IDAT") < moved.index(b"eXIf")
    image = ImagePart(data=moved)
    assert image_size(image, CONFIG) == load_image(image, CONFIG).size == (20, 30)


def test_the_header_is_enough_for_the_size() -> None:
    whole = encoded(Image.effect_noise((64, 48), 80).convert("RGB"))
    image = ImagePart(data=whole[: len(whole) // 2])
    assert image_size(image, CONFIG) == (64, 48)
    assert "cannot be decoded" in refused(image).problem


def test_every_mode_becomes_rgb_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    palette = Image.new("P", (4, 4))
    palette.putpalette([255, 0, 0])
    seen = {
        "clear": load_image(ImagePart(data=encoded(clear)), CONFIG),
        "solid": load_image(ImagePart(image=Image.new("RGBA", (4, 4), (255, 0, 0, 255))), CONFIG),
        "palette": load_image(ImagePart(data=encoded(palette)), CONFIG),
        "transparent palette": load_image(ImagePart(data=encoded(palette, transparency=0)), CONFIG),
        "gray": load_image(ImagePart(data=encoded(Image.new("L", (4, 4), 7))), CONFIG),
        "gray alpha": load_image(ImagePart(data=encoded(Image.new("LA", (4, 4), (0, 0)))), CONFIG),
        "deep gray": load_image(ImagePart(data=encoded(Image.new("I;16", (4, 4), 7 * 256))), CONFIG),
    }
    white, gray = (255, 255, 255), (7, 7, 7)
    assert {name: image.getpixel((1, 1)) for name, image in seen.items()} == {
        "clear": white,
        "solid": RED,
        "palette": RED,
        "transparent palette": white,
        "gray": gray,
        "gray alpha": white,
        "deep gray": gray,
    }
    assert {image.mode for image in seen.values()} == {"RGB"}


def test_the_camera_s_orientation_is_applied() -> None:
    image = Image.new("RGB", (30, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert load_image(ImagePart(data=encoded(image, "JPEG", exif=exif)), CONFIG).size == (20, 30)


def test_media_come_in_order_and_within_their_counts(root: Path) -> None:
    frames = tuple(ImagePart(image=Image.new("RGB", (28, 28), (i, 0, 0))) for i in range(3))
    video = VideoPart(frames, 2.0)
    row = Row((Message("user", (frames[1], TextPart("?"), video, frames[2])),), "1", where="rows.jsonl:9")
    images, videos = load_media(row, CONFIG)
    assert [image.getpixel((0, 0))[0] for image in images] == [1, 2]  # type: ignore[index]
    assert [[frame.getpixel((0, 0))[0] for frame in video] for video in videos] == [[0, 1, 2]]  # type: ignore[index]
    with pytest.raises(RowError, match=r"rows.jsonl:9: .*data.max_images=1"):
        load_media(row, replace(CONFIG, max_images=1))
    with pytest.raises(RowError, match=r"rows.jsonl:9: .*data.max_frames=2"):
        load_media(row, replace(CONFIG, max_frames=2))
