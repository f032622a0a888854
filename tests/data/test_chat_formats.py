"""verl's and LLaVA's rows."""

from pathlib import Path
from typing import Any

import pytest

from ovr_megatron.data.chat_formats import read_llava, read_verl
from ovr_megatron.data.formats import detect
from ovr_megatron.data.schema import Row, RowError, TextPart

ROOT = Path("/data")
VERL = {
    "data_source": "geo3k",
    "prompt": [{"role": "user", "content": "<image>Find x."}],
    "images": [{"bytes": b"png", "path": None}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "48"},
    "extra_info": {"split": "train", "index": 7},
}
LLAVA = {
    "id": "0001",
    "image": "coco/1.jpg",
    "conversations": [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "A bus."}],
}


def told(row: Row) -> list[list[Any]]:
    return [
        [part.text if isinstance(part, TextPart) else part.data or str(part.path) for part in message.parts]  # type: ignore[union-attr]
        for message in row.messages
    ]


def test_verl() -> None:
    row = read_verl(VERL, "f[0]", ROOT)
    assert detect(VERL, "") == "verl"
    assert told(row) == [[b"png", "Find x."]]
    assert (row.answer, row.source, row.id, row.is_prompt) == ("48", "geo3k", "7", True)
    text = {
        "data_source": "gsm8k",
        "prompt": [{"role": "user", "content": "1+1?"}],
        "reward_model": {"ground_truth": 2},
    }
    assert read_verl(text, "f[1]", ROOT).answer == "2"
    sft = {"prompt": "1+1?", "response": "It is 2."}
    assert told(read_verl(sft, "f[2]", ROOT)) == [["1+1?"], ["It is 2."]]


def test_llava() -> None:
    row = read_llava(LLAVA, "f[0]", ROOT)
    assert detect(LLAVA, "") == "llava"
    assert told(row) == [["What is it?\n", "/data/coco/1.jpg"], ["A bus."]]
    assert (row.id, row.response) == ("0001", "A bus.")
    unmarked = {**LLAVA, "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "<image>"}]}
    assert told(read_llava(unmarked, "f[0]", ROOT)) == [["/data/coco/1.jpg", "What?"], ["<image>"]]
    turns = [{"from": "human", "value": "<image>\n<image>\nSame?"}, {"from": "gpt", "value": "No."}]
    two = {"image": ["a.png", "b.png"], "conversations": turns}
    assert told(read_llava(two, "f[0]", ROOT))[0] == ["/data/a.png", "/data/b.png", "\nSame?"]


@pytest.mark.parametrize(
    ("reader", "raw", "field"),
    [
        (read_verl, {**VERL, "images": []}, "prompt"),
        (read_verl, {**VERL, "reward_model": {}}, "answer"),
        (read_verl, {**VERL, "prompt": [{"role": "tool", "content": "x"}]}, "prompt[0]"),
        (read_verl, {**VERL, "prompt": []}, "prompt"),
        (read_llava, {**LLAVA, "conversations": None}, "conversations"),
        (read_llava, {**LLAVA, "image": "https://a/b.png"}, "image[0]"),
        (read_llava, {**LLAVA, "conversations": LLAVA["conversations"][::-1]}, "conversations"),  # type: ignore[index]
    ],
)
def test_what_cannot_be_read_is_named(reader: Any, raw: Any, field: str) -> None:
    with pytest.raises(RowError) as error:
        reader(raw, "f[3]", ROOT)
    assert (error.value.where, error.value.field) == ("f[3]", field)
