"""Open images: inside their root, within limits, as RGB.

Every image of the project comes through `load_image`, so that the trainer, the rollout engine and the
evaluation see the same pixels and the same limits.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import ExifTags, Image

from ovr_megatron.config import DataConfig
from ovr_megatron.data.file_slices import FileSlice, read_slice
from ovr_megatron.data.schema import ImagePart, Row, RowError, VideoPart, all_parts
from ovr_megatron.data.video_files import VideoFrame, decode_frame

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_ASPECT = 200  # image processors of vision-language models refuse more elongated pictures

_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error)
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_ORIENTATION_TEXTS = (b"Raw profile type exif", b"XML:com.adobe")  # keys of texts that may hold an orientation
_TRANSPOSITIONS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange width and height


def load_image(part: ImagePart, config: DataConfig) -> Image.Image:
    """Open one image as RGB; transparency becomes white, EXIF orientation is applied.

    Raises:
        RowError: the file is missing, outside its root, no image, corrupt, or over ``max_image_bytes``,
            ``max_image_pixels`` or an aspect ratio of 200.
    """
    with _name_errors(part):
        image = _open(part, config)
        if part.image is None and part.frame is None:
            image = _apply_orientation(image)
        return _to_rgb(image)


def image_size(part: ImagePart, config: DataConfig) -> tuple[int, int]:
    """Return the width and height of `load_image`'s picture; of a file only the header is read.

    Raises:
        RowError: as `load_image`, but for damage behind the header.
    """
    if part.frame is not None:
        frame_size = (part.frame.width, part.frame.height)
        _check_size(frame_size, part, config)
        return frame_size
    with _name_errors(part):
        image = _open(part, config)
        width, height = image.size
        # Pillow gives a TIFF the size of the turned picture; a picture in memory is not turned.
        if part.image is not None or image.format == "TIFF":
            return width, height
        if _read_orientation(image) in _SIDEWAYS:
            return height, width
        return width, height


@contextmanager
def _name_errors(part: ImagePart) -> Iterator[None]:
    """Turn Pillow's errors into a `RowError` that names the row of ``part``."""
    try:
        yield
    except RowError:
        raise
    except _DECODE_ERRORS as error:
        formats = ", ".join(FORMATS)
        remedy = f"give an intact {formats} file or remove the row"
        raise _error(part, f"cannot be decoded ({error})", remedy) from error


def _open(part: ImagePart, config: DataConfig) -> Image.Image:
    """Return the image of ``part``, checked by its header and not yet decoded."""
    image = part.image
    if part.frame is not None:
        # Before it is decoded.
        _check_size((part.frame.width, part.frame.height), part, config)
        image = Image.fromarray(decode_frame(part.frame))
    if image is None:
        data = encoded_image(part, config)
        # Pillow's own bound would refuse what `data.max_image_pixels` allows; `_check_size` holds before any decoding.
        Image.MAX_IMAGE_PIXELS = None
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except ValueError:  # a comment that is too large when unpacked
            data_without_texts = _strip_png_texts(data)
            image = Image.open(io.BytesIO(data_without_texts), formats=FORMATS)
    _check_size(image.size, part, config)
    if image.mode in ("F", "I") and image.format != "PNG":
        remedy = "convert it to 8 bits a channel, since the range of its values is not known"
        raise _error(part, f"has pixels of 32 bits (mode {image.mode})", remedy)
    return image


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and end of every chunk of a PNG, in order."""
    start = len(_PNG)
    while start + 12 <= len(data):
        (size,) = struct.unpack_from(">I", data, start)
        name = data[start + 4 : start + 8]
        end = start + 12 + size  # length, name and checksum take 12 bytes
        yield name, start, end
        start = end


def _strip_png_texts(data: bytes) -> bytes:
    """Return the file without the texts that a PNG may carry; other files as they are."""
    if not data.startswith(_PNG):
        return data
    chunks = [_PNG]
    for name, start, end in _png_chunks(data):
        if name not in _PNG_TEXTS:
            chunks.append(data[start:end])
    return b"".join(chunks)


def _may_have_orientation(data: bytes) -> bool:
    """Return whether a chunk of a PNG may hold an orientation: EXIF, also as a text, or XMP."""
    for name, start, end in _png_chunks(data):
        if name == b"eXIf":
            return True
        # The beginning is enough: a text may have megabytes.
        content = data[start + 8 : min(end, start + 40)]
        if name in _PNG_TEXTS and content.startswith(_ORIENTATION_TEXTS):
            return True
    return False


def _read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 where there is none; a PNG is decoded only if it may stand behind the pixels."""
    file = getattr(image, "fp", None)  # closed when the pixels were read
    if image.format == "PNG" and "exif" not in image.info:
        if isinstance(file, io.BytesIO) and not _may_have_orientation(file.getvalue()):
            return 1
    exif = image.getexif()
    return exif.get(ExifTags.Base.Orientation, 1)


def _apply_orientation(image: Image.Image) -> Image.Image:
    """Return the image turned by its EXIF orientation; no other EXIF field, which may be damaged, is read."""
    image.load()  # a TIFF turns itself
    transposition = _TRANSPOSITIONS.get(_read_orientation(image))
    if transposition is None:
        return image
    return image.transpose(transposition)


def load_media(
    row: Row,
    config: DataConfig,
) -> tuple[list[Image.Image], list[list[Image.Image]]]:
    """Open the images and the video frames of ``row`` in the order in which they appear.

    Returns:
        The images, and one list of frames per video.

    Raises:
        RowError: as `load_image`, or more than ``max_images`` images or ``max_frames`` frames in a video.
    """
    # Before any is opened: too many would fill the memory.
    check_counts(row, config)
    parts = all_parts(row.messages)
    images = []
    for part in parts:
        if isinstance(part, ImagePart):
            images.append(load_image(part, config))
    videos = []
    for part in parts:
        if isinstance(part, VideoPart):
            frames = [load_image(frame, config) for frame in part.frames]
            videos.append(frames)
    return images, videos


def check_counts(row: Row, config: DataConfig) -> None:
    """Raise `RowError` for more than ``max_images`` images or ``max_frames`` frames in a video."""
    parts = all_parts(row.messages)
    images = sum(isinstance(part, ImagePart) for part in parts)
    _check_count(row, "images", images, "max_images", config.max_images)
    for video in parts:
        if isinstance(video, VideoPart):
            frames = len(video.frames)
            _check_count(row, "frames in a video", frames, "max_frames", config.max_frames)


def encoded_image(part: ImagePart, config: DataConfig) -> bytes:
    """Return the image file of a part that is not a picture in memory, not yet decoded.

    Raises:
        RowError: the file is missing, outside its root, or over ``max_image_bytes``.
    """
    if part.frame is not None:
        with _name_errors(part):
            return frame_png(part.frame)
    data = part.data
    if data is None and part.file is not None:
        data = _read_slice(part, part.file, config)
    if data is None:
        data = _read(part, config)
    _check_bytes(part, len(data), config)
    return data


def png_bytes(image: Image.Image) -> bytes:
    """Return a picture as a PNG file, which keeps its pixels as they are."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def frame_png(frame: VideoFrame) -> bytes:
    """Return a frame of a video file as a PNG file.

    Raises:
        VideoFileError: it cannot be decoded.
    """
    return png_bytes(Image.fromarray(decode_frame(frame)))


def _read_slice(part: ImagePart, file: FileSlice, config: DataConfig) -> bytes:
    # Before it is read: a member may have any size.
    _check_bytes(part, file.size, config)
    try:
        return read_slice(file)
    except OSError as error:
        raise _error(part, f"cannot be read ({error})", "check the shard and the connection") from error


def _read(part: ImagePart, config: DataConfig) -> bytes:
    assert part.path is not None, "an ImagePart has a path, a file, an image or data"
    path = resolve_in_root(part, part.path)
    # Before it is read: a path may name a file of any size.
    _check_bytes(part, path.stat().st_size, config)
    try:
        return path.read_bytes()
    except OSError as error:
        raise _error(part, f"cannot be read ({error.strerror})", "check the permissions of the file") from error


def resolve_in_root(part: ImagePart, path: Path, medium: str = "image") -> Path:
    """Return ``path`` without links; raise `RowError` if it is no file below the root of ``part``."""
    try:
        resolved = path.resolve()
        outside = False
        if part.root is not None:
            root = part.root.resolve()
            outside = not resolved.is_relative_to(root)
        missing = not resolved.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a loop of links, a zero byte
        raise _error(part, f"is no usable path ({error})", "correct the path or remove the row", medium) from error
    if outside:
        remedy = f"move the {medium} below it or set image_root"
        raise _error(part, f"lies outside the image root {part.root}", remedy, medium)
    if missing:
        raise _error(part, "does not exist", "correct the path, set image_root, or remove the row", medium)
    return resolved


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I"):  # 16 bits; a PNG's may come as 32.  "L" would clip at 255.
        wide = image.convert("I")
        image = wide.point(lambda value: value / 256).convert("L")
    if "A" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        # On white, the paper of most figures: a conversion alone would show the colour behind transparent pixels.
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba)
    return image.convert("RGB")


def _check_size(size_of_image: tuple[int, int], part: ImagePart, config: DataConfig) -> None:
    width, height = size_of_image
    size = f"{width} x {height} pixels"
    if width * height > config.max_image_pixels:
        raise _too_large(part, f"has {size}", "max_image_pixels", config.max_image_pixels)
    if max(width, height) > MAX_ASPECT * min(width, height):
        remedy = f"crop it to at most 1:{MAX_ASPECT}"
        raise _error(part, f"of {size} is too elongated", remedy)


def _check_bytes(part: ImagePart, size: int, config: DataConfig) -> None:
    if size > config.max_image_bytes:
        raise _too_large(part, f"has {size:,} bytes", "max_image_bytes", config.max_image_bytes)


def _check_count(row: Row, what: str, count: int, key: str, limit: int) -> None:
    if count > limit:
        problem = f"{count} {what}, more than data.{key}={limit}"
        remedy = f"remove the row or raise data.{key}"
        raise RowError(row.where, "messages", problem, remedy)


def _too_large(part: ImagePart, problem: str, key: str, limit: int) -> RowError:
    problem = f"{problem}, more than data.{key}={limit:,}"
    remedy = f"shrink the image or raise data.{key}"
    return _error(part, problem, remedy)


def _error(part: ImagePart, problem: str, remedy: str, medium: str = "image") -> RowError:
    name = medium
    if part.path is not None:
        name = f"{medium} {str(part.path)!r}"
    elif part.file is not None:
        name = f"image {part.file.name!r}"
    elif part.frame is not None:
        name = f"frame {part.frame.index} of {str(part.frame.path)!r}"
    return RowError(part.where, part.field, f"{name} {problem}", remedy)
