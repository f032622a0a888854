"""Files of one JSON object a line."""

import pytest

from ovr_megatron.runtime.json_lines import json_lines, read_json_lines

CONTENT = b'\xef\xbb\xbf{"a": "\xc3\xa9\xe2\x80\xa8"}\r\n\n{"b": 1}\n[1]\n\0\0\n{"a": \xff}\n{"a"'


def test_lines_have_their_number_and_offset_and_only_line_feeds_end_them(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(CONTENT)
    lines = list(json_lines(path))
    assert [line.number for line in lines] == [1, 3, 4, 5, 6, 7]
    assert [CONTENT[line.offset :].startswith(line.content) for line in lines] == [True] * 6
    assert [line.is_complete for line in lines] == [True] * 5 + [False]
    assert [line.parse_or_none() for line in lines] == [{"a": "é\u2028"}, {"b": 1}, None, None, None, None]


@pytest.mark.parametrize(
    ("index", "problem"),
    [(2, "a list, not an object"), (3, "not JSON at column 1"), (4, "invalid start byte"), (5, "not JSON at column 5")],
)
def test_a_line_that_is_no_object_says_why(tmp_path, index, problem):
    path = tmp_path / "a.jsonl"
    path.write_bytes(CONTENT)
    with pytest.raises(ValueError, match=problem):
        list(json_lines(path))[index].parse()


def test_damaged_lines_are_left_out_and_named(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_bytes(CONTENT)
    assert read_json_lines(path, "a") == [{"a": "é\u2028"}]
    assert f"{path}:3 and 3 more lines: damaged, left out" in capsys.readouterr().err
