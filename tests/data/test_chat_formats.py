"""Chats of others: verl's, LLaVA's, Alpaca's and ms-swift's rows, and what stands in columns beside them."""

import base64
from pathlib import Path
from typing import Any

import pytest

from ovr_megatron.data.formats import detect, find_reader
from ovr_megatron.data.schema import Row, RowError, TextPart, VideoPart

ROOT = Path("/data")
read_verl, read_llava = find_reader("verl"), find_reader("llava")
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
        (read_verl, {**VERL, "prompt": [{"role": "tool", "content": "x"}]}, "prompt[0].role"),
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


MESSAGES = {"messages": [{"role": "user", "content": "<image>Left or <image>right?"}], "answer": "left"}
REPLY = {"role": "assistant", "content": "x"}
QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
read_messages, read_alpaca = find_reader("messages"), find_reader("alpaca")


def test_columns_fill_marks_in_order() -> None:
    expected = [["/data/a.png", "Left or ", "/data/b.png", "right?"]]
    two = {"images": ["a.png", "b.png"]}
    assert told(read_messages({**MESSAGES, **two}, "f[0]", ROOT)) == expected
    tokens = {"messages": [{"role": "user", "content": f"{QWEN}Left or {QWEN}right?"}], "answer": "left"}
    assert told(read_messages({**tokens, **two}, "f[0]", ROOT)) == expected
    parts = [{"type": "image"}, {"type": "text", "text": "Left or "}, {"type": "image"}, {"type": "text", "text": "r"}]
    placed = {"messages": [{"role": "user", "content": parts}], "answer": "left"}
    assert told(read_messages({**placed, **two}, "f[0]", ROOT)) == [[*expected[0][:3], "r"]]
    unmarked = {"messages": [{"role": "user", "content": "Both?"}], "answer": "left"}
    assert told(read_messages({**unmarked, **two}, "f[0]", ROOT)) == [["/data/a.png", "/data/b.png", "Both?"]]


PNG_URL = "data:image/png;base64," + base64.b64encode(b"png").decode()
IMAGES = ["/data/a.png", b"png"]


def ask(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [*parts, {"type": "text", "text": "Same?"}]}


@pytest.mark.parametrize(
    ("form", "raw", "expected"),
    [
        # OpenAI: a chat as its interface takes it, and as Responses
        (
            "messages",
            {
                "messages": [
                    {"role": "system", "content": [{"type": "text", "text": "Look."}]},
                    ask(
                        {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
                        {"type": "image_url", "image_url": {"url": PNG_URL}},
                    ),
                    {"role": "assistant", "content": "No."},
                ]
            },
            [["Look."], [*IMAGES, "Same?"], ["No."]],
        ),
        (
            "messages",
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "input_image", "image_url": "file:///data/a.png"},
                            {"type": "input_image", "image_url": PNG_URL},
                            {"type": "input_text", "text": "Same?"},
                        ],
                    },
                    {"role": "assistant", "content": [{"type": "output_text", "text": "No."}]},
                ]
            },
            [[*IMAGES, "Same?"], ["No."]],
        ),
        # Transformers: parts with a path or a URL
        (
            "messages",
            {
                "messages": [
                    ask({"type": "image", "path": "a.png"}, {"type": "image", "url": PNG_URL}),
                    {"role": "assistant", "content": "No."},
                ]
            },
            [[*IMAGES, "Same?"], ["No."]],
        ),
        # TRL: messages and a column of images, and a prompt with its completion
        (
            "messages",
            {
                "messages": [ask({"type": "image"}, {"type": "image"}), {"role": "assistant", "content": "No."}],
                "images": ["a.png", {"bytes": b"png", "path": None}],
            },
            [[*IMAGES, "Same?"], ["No."]],
        ),
        (
            "verl",
            {
                "prompt": [ask({"type": "image"}, {"type": "image"})],
                "completion": [{"role": "assistant", "content": "No."}],
                "images": ["a.png", PNG_URL],
            },
            [[*IMAGES, "Same?"], ["No."]],
        ),
        ("verl", {"prompt": "Same?", "completion": "No."}, [["Same?"], ["No."]]),
        # Alpaca, as published and with an image
        ("alpaca", {"instruction": "Add.", "input": "1 1", "output": "2"}, [["Add.\n1 1"], ["2"]]),
        (
            "alpaca",
            {"instruction": "What?", "input": "", "output": "A bus.", "images": ["a.png"]},
            [["/data/a.png", "What?"], ["A bus."]],
        ),
        # ShareGPT: several turns, a system message as a column or as the first turn
        (
            "llava",
            {
                "system": "Be short.",
                "conversations": [
                    {"from": "human", "value": "1?"},
                    {"from": "gpt", "value": "2"},
                    {"from": "human", "value": "3?"},
                    {"from": "gpt", "value": "4"},
                ],
            },
            [["Be short."], ["1?"], ["2"], ["3?"], ["4"]],
        ),
    ],
)
def test_rows_of_other_trainers_are_recognised(form: str, raw: Any, expected: list[list[Any]]) -> None:
    assert detect(raw, "f[0]") == form
    assert told(find_reader(form)(raw, "f[0]", ROOT)) == expected


def test_a_url_that_cannot_be_read_is_named() -> None:
    for url, problem in (("https://a/b.png", "is a URL"), ("data:image/png;base64,###", "the data: URL is not base64")):
        with pytest.raises(RowError) as error:
            read_messages({"messages": [ask({"type": "image_url", "image_url": {"url": url}})]}, "f[3]", ROOT)
        assert problem in str(error.value) and error.value.field == "messages[0].content[0].image_url"


def test_a_column_of_frames_is_a_video() -> None:
    asked = {"messages": [{"role": "user", "content": "<video>What falls?"}], "answer": "a ball", "fps": 4}
    for column in ({"videos": [["f0.png", "f1.png"]]}, {"video": ["f0.png", "f1.png"]}):
        video, text = read_messages({**asked, **column}, "f[0]", ROOT).messages[0].parts
        assert isinstance(video, VideoPart) and video.fps == 4
        assert [frame.path for frame in video.frames] == [ROOT / "f0.png", ROOT / "f1.png"]
        assert text == TextPart("What falls?")


def test_alpaca_and_query_have_system_history_and_input() -> None:
    row = read_alpaca(
        {
            "instruction": "Add.", "input": "2 and 3", "output": "5", "system": "Be brief.",
            "history": [["Hi", "Hello"]], "images": [], "tools": "[]",
        },
        "f[0]",
        ROOT,
    )  # fmt: skip
    assert [(message.role, message.text) for message in row.messages] == [
        ("system", "Be brief."),
        *(("user", "Hi"), ("assistant", "Hello")),
        *(("user", "Add.\n2 and 3"), ("assistant", "5")),
    ]
    query = {"query": "<image>Which?", "response": "5", "images": ["a.png"]}
    assert detect(query, "") == "query"
    assert told(find_reader("query")(query, "f[0]", ROOT)) == [["/data/a.png", "Which?"], ["5"]]


def test_a_weight_of_zero_keeps_a_reply_as_context() -> None:
    turns = [*MESSAGES["messages"], {**REPLY, "weight": 0}, {"role": "user", "content": "y"}, {**REPLY, "loss": True}]
    row = read_messages({"messages": turns, "images": ["a.png", "b.png"]}, "f[0]", ROOT)
    assert [message.learn for message in row.messages] == [True, False, True, True]


def test_a_hint_belongs_to_its_question() -> None:
    raw = {"question": "Which?", "choices": ["l", "r"], "answer": 1, "hint": "Left is red.", "image": None}
    assert told(find_reader("mmlu")(raw, "f[0]", ROOT))[0][0].startswith("Left is red.\nWhich?\n(A) l\n(B) r")


SFT = [{"role": "user", "content": "Hi"}, REPLY]


@pytest.mark.parametrize(
    ("raw", "field", "problem"),
    [
        ({**MESSAGES, "images": ["a.png"]}, "messages", "has 2 marks <image>, and the row has 1 images"),
        (MESSAGES, "messages", "has 2 marks <image>, and the row has 0 images"),
        ({"messages": SFT, "images": ["a.png"], "image": "b.png"}, "image", "stands beside 'images'"),
        ({"messages": SFT, "audio": {"array": [0.1], "sampling_rate": 8000}}, "audio", "does not read"),
        ({"messages": SFT, "frames": [{"bytes": b"png", "path": None}]}, "frames", "does not read"),
        ({"messages": SFT, "question_image_url": "https://a.b/c"}, "question_image_url", "does not read"),
        ({"messages": SFT, "file_name": "0001.jpg"}, "file_name", "does not read"),
        ({"messages": [{**SFT[0], "images": ["a.png"]}, REPLY]}, "messages[0].images", "does not read"),
        ({"messages": [{**SFT[0], "content": "<video>Hi"}, REPLY]}, "messages", "1 marks <video>"),
        ({"messages": [{**SFT[0], "content": "<audio>Hi"}, REPLY]}, "messages", "has <audio> in a user's text"),
        ({"messages": [{**SFT[0], "content": "<|image_pad|>"}, REPLY]}, "messages", "has <|image_pad|>"),
        ({"messages": SFT, "tools": [{"name": "search"}]}, "tools", "is not read"),
        ({"messages": SFT, "history": [["a", "b"]]}, "history", "is not read"),
        ({"messages": [SFT[0], {**REPLY, "tool_calls": [{"id": 1}]}]}, "messages[1].tool_calls", "is not read"),
        ({"messages": [SFT[0], {**REPLY, "thinking": "Hm"}]}, "messages[1].thinking", "is not read"),
        ({"messages": [SFT[0], {**REPLY, "weight": 0.5}]}, "messages[1].weight", "0.5"),
        ({"messages": [{**SFT[0], "reasoning_content": "Hm"}, REPLY]}, "messages[0].reasoning_content", "of the user"),
        (
            {"messages": [SFT[0], {**REPLY, "content": "a</think>b", "reasoning_content": "Hm"}]},
            "messages[1].reasoning_content",
            "a thought of its own",
        ),
        (
            {"messages": [{"role": "system", "content": "a"}, *SFT], "system": "b"},
            "system",
            "another system message",
        ),
        ({"messages": SFT[:1], "solution": "So \\boxed{3}"}, "solution", "derivation"),
        ({"messages": SFT[:1], "answer": "1", "video": "a.mp4"}, "video[0]", "a.mp4' does not exist"),
    ],
)
def test_nothing_that_belongs_to_a_chat_is_left_out_without_a_word(raw: Any, field: str, problem: str) -> None:
    with pytest.raises(RowError) as error:
        read_messages(raw, "f[3]", ROOT)
    assert (error.value.where, error.value.field) == ("f[3]", field)
    assert problem in error.value.problem


def test_names_that_only_look_like_media_are_no_media() -> None:
    more = {"id": "coco/1.jpg", "source": "a.png", "image_width": 30, "image_id": 7, "img_type": "['Plot']"}
    empty = {"image": None, "videos": [], "picture": {"bytes": None}}
    assert read_messages({"messages": SFT, **more, **empty}, "f[0]", ROOT).response == "x"
