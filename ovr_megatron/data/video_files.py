"""Take frames out of video files, one at a time and in order; the file stays where it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg")
MOST_FRAMES = 10_000  # of a row: a header may claim any number
MOST_PIXELS = 100_000_000  # of a frame: the first is decoded before data.max_image_pixels is known
# What such files begin with, by offset. FFmpeg goes by content and would take a playlist, which names other files and
# addresses, whatever the file is called.
_BEGINNINGS = (
    (4, (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")),
    (0, (b"\x1a\x45\xdf\xa3", b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3")),
    (8, (b"AVI ",)),
)


class VideoFileError(ValueError):
    """A video file that cannot be decoded; the message says what is wrong."""


@dataclass(frozen=True)
class VideoFrame:
    """Frame ``index`` of the video file at ``path``, of ``width`` x ``height`` pixels as decoded."""

    path: Path
    index: int
    width: int
    height: int


@dataclass(frozen=True)
class _Header:
    """What a video file says of itself, with the size of its first frame."""

    frames: int
    fps: float
    width: int
    height: int


def sample_frames(path: Path, fps: float) -> tuple[list[VideoFrame], float]:
    """Return ``fps`` frames a second of a video file, evenly spaced, and their rate; all of a file that has fewer.

    Raises:
        VideoFileError: it cannot be decoded, or would give more than `MOST_FRAMES` frames.
    """
    header = _read_header(path, path.stat().st_mtime_ns)
    rate = min(fps, header.fps)
    count = max(int(header.frames / header.fps * rate), 1)
    if count > MOST_FRAMES:
        raise VideoFileError(f"has {count:,} frames at {rate:g} a second")
    frames = []
    for position in range(count):
        index = min(round(position * header.fps / rate), header.frames - 1)
        frames.append(VideoFrame(path, index, header.width, header.height))
    return frames, rate


def is_video_name(value: object) -> bool:
    """Return whether ``value`` is the name of a video file."""
    return isinstance(value, str) and value.lower().endswith(SUFFIXES)


def decode_frame(frame: VideoFrame) -> np.ndarray:
    """Return the pixels of a frame as uint8[height, width, 3], RGB.

    Raises:
        VideoFileError: the file ends before it, or is damaged there.
    """
    reader = _reader(frame.path, frame.path.stat().st_mtime_ns)
    return reader.read(frame.index)


@lru_cache(maxsize=4096)
def _read_header(path: Path, modified_ns: int) -> _Header:
    """Read the header and the first frame, whose size counts: a file may turn its pictures."""
    import cv2  # noqa: PLC0415 (only rows with video files wait for it)

    with path.open("rb") as file:
        beginning = file.read(12)
    if not any(beginning[offset:].startswith(marks) for offset, marks in _BEGINNINGS):
        raise VideoFileError("is no video file")
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    claimed = capture.get(cv2.CAP_PROP_FRAME_WIDTH) * capture.get(cv2.CAP_PROP_FRAME_HEIGHT)
    if claimed > MOST_PIXELS:
        raise VideoFileError(f"has frames of {claimed:,.0f} pixels, more than {MOST_PIXELS:,}")
    read, first = capture.read()
    frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    fps = float(capture.get(cv2.CAP_PROP_FPS))
    capture.release()
    if not read or frames < 1 or not 0 < fps < math.inf:
        raise VideoFileError("cannot be decoded")
    height, width = first.shape[:2]
    return _Header(frames, fps, width, height)


class _SequentialReader:
    """Reads frames of one file in ascending order; an earlier one opens the file again.

    A jump would be to a key frame, which is not exact in every format.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open()

    def _open(self) -> None:
        import cv2  # noqa: PLC0415 (as above)

        self._capture = cv2.VideoCapture(str(self._path), cv2.CAP_FFMPEG)
        self._next = 0

    def read(self, index: int) -> np.ndarray:
        """Return the pixels of frame ``index``."""
        if index < self._next:
            self._open()
        while self._next < index:
            if not self._capture.grab():
                raise VideoFileError(f"ends or is damaged at frame {self._next}")
            self._next += 1
        read, pixels = self._capture.read()
        if not read:
            raise VideoFileError(f"ends or is damaged at frame {index}")
        self._next += 1
        return np.ascontiguousarray(pixels[:, :, ::-1])  # OpenCV has blue first


@lru_cache(maxsize=1)
def _reader(path: Path, modified_ns: int) -> _SequentialReader:
    """Return the reader of a file; the frames of a video are read one after another, and then those of the next."""
    return _SequentialReader(path)
