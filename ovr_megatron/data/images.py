"""Opening images: inside their root, within limits, as RGB.

Every image of the project comes through `load_image`, so that the trainer, the rollout engine and the
evaluation see the same pixels and the same limits.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path

from PIL import Image, ImageOps

from ovr_megatron.config import DataConfig
from ovr_megatron.data.schema import ImagePart, Row, RowError, VideoPart

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_ASPECT = 200  # the Qwen2.5-VL image processor refuses more elongated pictures

_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error)


def load_image(part: ImagePart, config: DataConfig) -> Image.Image:
    """Open one image as RGB; transparency becomes white, EXIF orientation is applied.

    Raises:
        RowError: the file is missing, outside its root, no image, corrupt, or over ``max_image_bytes``,
            ``max_image_pixels`` or an aspect ratio of 200.
    """
    file = io.BytesIO(encoded_image(part, config)) if part.image is None else None
    try:
        image = Image.open(file, formats=FORMATS) if file else part.image
        assert image is not None, "an ImagePart has a path, an image or data"
        _check_size(image, part, config)
        return _to_rgb(ImageOps.exif_transpose(image) if file else image)
    except RowError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(part, str(error), "max_image_pixels", config.max_image_pixels) from error
    except _DECODE_ERRORS as error:
        remedy = f"give an intact {', '.join(FORMATS)} file or remove the row"
        raise _error(part, f"cannot be decoded ({error})", remedy) from error


def load_media(row: Row, config: DataConfig) -> tuple[list[Image.Image], list[list[Image.Image]]]:
    """Open the images and the video frames of ``row`` in the order in which they appear.

    Returns:
        The images, and one list of frames per video.

    Raises:
        RowError: as `load_image`, or more than ``max_images`` images or ``max_frames`` frames in a video.
    """
    parts = [part for message in row.messages for part in message.parts]
    images = [part for part in parts if isinstance(part, ImagePart)]
    videos = [part for part in parts if isinstance(part, VideoPart)]
    _check_count(row, "images", len(images), "max_images", config.max_images)
    for video in videos:
        _check_count(row, "frames in a video", len(video.frames), "max_frames", config.max_frames)
    opened = [load_image(part, config) for part in images]
    return opened, [[load_image(frame, config) for frame in video.frames] for video in videos]


def encoded_image(part: ImagePart, config: DataConfig) -> bytes:
    """The image file of a part that is not a picture in memory, not yet decoded.

    Raises:
        RowError: the file is missing, outside its root, or over ``max_image_bytes``.
    """
    data = part.data if part.data is not None else _read(part, config)
    if len(data) > config.max_image_bytes:
        raise _too_large(part, f"has {len(data):,} bytes", "max_image_bytes", config.max_image_bytes)
    return data


def _read(part: ImagePart, config: DataConfig) -> bytes:
    assert part.path is not None, "an ImagePart has a path, an image or data"
    path = _inside_root(part, part.path)
    size = path.stat().st_size
    if size > config.max_image_bytes:
        raise _too_large(part, f"has {size:,} bytes", "max_image_bytes", config.max_image_bytes)
    try:
        return path.read_bytes()
    except OSError as error:
        raise _error(part, f"cannot be read ({error.strerror})", "check the permissions of the file") from error


def _inside_root(part: ImagePart, path: Path) -> Path:
    try:
        resolved = path.resolve()
        outside = part.root is not None and not resolved.is_relative_to(part.root.resolve())
        missing = not resolved.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a loop of links, a zero byte
        raise _error(part, f"is no usable path ({error})", "correct the path or remove the row") from error
    if outside:
        raise _error(part, f"lies outside the image root {part.root}", "move the image below it or set image_root")
    if missing:
        raise _error(part, "does not exist", "correct the path, set image_root, or remove the row")
    return resolved


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if "A" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba)
    return image.convert("RGB")


def _check_size(image: Image.Image, part: ImagePart, config: DataConfig) -> None:
    width, height = image.size
    if width * height > config.max_image_pixels:
        raise _too_large(part, f"has {width} x {height} pixels", "max_image_pixels", config.max_image_pixels)
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise _error(part, f"of {width} x {height} pixels is too elongated", f"crop it to at most 1:{MAX_ASPECT}")


def _check_count(row: Row, what: str, count: int, key: str, limit: int) -> None:
    if count > limit:
        remedy = f"remove the row or raise data.{key}"
        raise RowError(row.where, "messages", f"{count} {what}, more than data.{key}={limit}", remedy)


def _too_large(part: ImagePart, problem: str, key: str, limit: int) -> RowError:
    return _error(part, f"{problem}, more than data.{key}={limit:,}", f"shrink the image or raise data.{key}")


def _error(part: ImagePart, problem: str, remedy: str) -> RowError:
    name = f"image {str(part.path)!r} " if part.path is not None else "image "
    return RowError(part.where, part.field, name + problem, remedy)
