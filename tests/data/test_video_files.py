"""Video files: the frames that a rate asks for, as OpenCV reads them in order; what is no video is refused."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from ovr_megatron.config import DataConfig, SourceConfig
from ovr_megatron.data.images import image_size, load_media
from ovr_megatron.data.row_json import row_to_json
from ovr_megatron.data.row_parsing import parse_row
from ovr_megatron.data.schema import Row, RowError
from ovr_megatron.data.sources import open_source

FPS, FRAMES, SIZE = 10, 30, (64, 48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seconds of grey that becomes brighter by eight levels a frame."""
    folder = tmp_path_factory.mktemp("videos")
    writer = cv2.VideoWriter(str(folder / "clip.avi"), cv2.VideoWriter_fourcc(*"MJPG"), FPS, SIZE)
    assert writer.isOpened()
    for frame in range(FRAMES):
        writer.write(np.full((SIZE[1], SIZE[0], 3), 8 * frame, np.uint8))
    writer.release()
    return folder


def read_row(folder: Path, part: dict, name: str = "rows.jsonl") -> Row:
    content = [{"type": "video"} | part, {"type": "text", "text": "What happens?"}]
    row = {"messages": [{"role": "user", "content": content}], "answer": "it gets brighter"}
    (folder / name).write_text(json.dumps(row))
    return open_source(SourceConfig(path=str(folder / name)))[0]


def frames_of(row: Row, most: int = 64) -> list[Image.Image]:
    _, (frames,) = load_media(row, DataConfig(max_frames=most))
    return frames


def all_frames(path: Path) -> list[np.ndarray]:
    capture = cv2.VideoCapture(str(path))
    frames = []
    while True:
        read, pixels = capture.read()
        if not read:
            return frames
        frames.append(pixels[:, :, ::-1])


@pytest.mark.parametrize(
    ("fps", "indices"), [(2, range(0, 30, 5)), (None, range(0, 30, 5)), (25, range(30)), (0.1, [0])]
)
def test_frames_are_evenly_spaced(folder: Path, fps: float | None, indices: range | list[int]) -> None:
    row = read_row(folder, {"video": "clip.avi"} | ({"fps": fps} if fps else {}))
    video = row.messages[0].parts[0]
    assert video.fps == min(fps or 2, FPS)
    everything = all_frames(folder / "clip.avi")
    assert len(everything) == FRAMES
    frames = [np.asarray(frame) for frame in frames_of(row)]
    assert len(frames) == len(indices)
    for frame, index in zip(frames, indices, strict=True):
        np.testing.assert_array_equal(frame, everything[index])
        assert abs(float(frame.mean()) - 8 * index) < 4
    assert {image_size(part, DataConfig()) for part in video.frames} == {SIZE}
    # Out of order, too: an earlier frame after a later one.
    np.testing.assert_array_equal(np.asarray(frames_of(row)[0]), everything[0])


def test_a_column_may_name_files(folder: Path) -> None:
    row = {"messages": [{"role": "user", "content": "<video>\n<video>\nWhich is longer?"}], "answer": "none"}
    (folder / "columns.jsonl").write_text(json.dumps(row | {"videos": ["clip.avi", "clip.avi"]}))
    (folder / "column.jsonl").write_text(json.dumps(row | {"video": ["clip.avi", "clip.avi"]}))
    for name in ("columns.jsonl", "column.jsonl"):
        parsed = open_source(SourceConfig(path=str(folder / name)))[0]
        _, videos = load_media(parsed, DataConfig())
        assert [len(frames) for frames in videos] == [6, 6]


def test_a_written_row_has_the_frames(folder: Path) -> None:
    row = read_row(folder, {"video": "clip.avi"})
    again = parse_row(json.loads(json.dumps(row_to_json(row))), "rows:1", folder)
    ours, theirs = frames_of(again), frames_of(row)
    assert all(np.array_equal(one, two) for one, two in zip(ours, theirs, strict=True))


def test_more_frames_than_allowed_are_refused(folder: Path) -> None:
    row = read_row(folder, {"video": "clip.avi", "fps": 10})
    with pytest.raises(RowError, match=r"30 frames in a video, more than data.max_frames=16"):
        frames_of(row, most=16)
    with pytest.raises(RowError, match=r"frame 0 of .*clip.avi' has 64 x 48 pixels, more than data.max_image_pixels"):
        load_media(row, DataConfig(max_frames=64, max_image_pixels=100))


def test_what_is_no_video_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.avi").write_bytes((folder / "clip.avi").read_bytes())
    (folder / "link.avi").symlink_to(tmp_path / "secret.avi")
    (folder / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\n{folder / 'clip.avi'}\n")
    (folder / "riff.avi").write_bytes(b"RIFF\nc=IN IP4 0.0.0.0\n")
    (folder / "cut.avi").write_bytes((folder / "clip.avi").read_bytes()[:300])
    cases = {
        "link.avi": "lies outside the image root",
        "../x.avi": "lies outside the image root|does not exist",
        "absent.avi": "does not exist",
        "list.mp4": "is no video file",
        "cut.avi": "cannot be decoded",
        "riff.avi": "is no video file",
        "https://a.b/c.mp4": "is a URL; download the video",
        "frame.png": r"give the path of a video file \(.mp4",
    }
    for value, problem in cases.items():
        with pytest.raises(RowError, match=problem) as error:
            read_row(folder, {"video": value})
        assert str(error.value).startswith(str(folder / "rows.jsonl:1"))
