"""Files that are written at once or not at all."""

import json
import os
import stat

import pytest

from ovr_megatron.runtime.files import atomic_file, write_json, write_whole


@pytest.mark.parametrize("content", ["é\r\n", b"\x00\xff"])
@pytest.mark.parametrize("durable", [False, True])
def test_the_content_is_written_unchanged(tmp_path, content, durable):
    path = write_whole(tmp_path / "a.txt", content, durable)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert os.listdir(tmp_path) == ["a.txt"]


def test_others_may_read_what_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        path = write_whole(tmp_path / "a.txt", "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_the_old_content_stands_until_the_new_is_complete_and_after_an_error(tmp_path):
    path = write_whole(tmp_path / "a.txt", "old")
    with pytest.raises(KeyError), atomic_file(path) as file:
        file.write(b"ne")
        file.flush()
        assert path.read_text() == "old"
        raise KeyError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = write_json(tmp_path / "a.json", {"é": [1]}, indent=1, ensure_ascii=False)
    with pytest.raises(TypeError):
        write_json(path, {1, 2})
    assert path.read_text(encoding="utf-8") == '{\n "é": [\n  1\n ]\n}\n'
    assert json.loads(write_json(path, {"é": 1}).read_text(encoding="ascii")) == {"é": 1}
