"""Rows and sources that cannot be used, for tests/soak/bad_inputs.py."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

from bad_input_case import Case
from bad_input_settings import COLD_START, RL
from PIL import Image

TOKENISE = ("tools/tokenise.py", "{tmp}/set", "--model", "{model}")
SOURCE = "data.sources=[{path: {tmp}/rows.jsonl}]"
THOUGHT = "<think>Add the two.</think>So \\boxed{2}."


def chat(user: Any, assistant: Any = THOUGHT, **more: Any) -> dict[str, Any]:
    """Return a supervised row."""
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}], **more}


def prompt(user: Any, **more: Any) -> dict[str, Any]:
    """Return a prompt row."""
    return {"messages": [{"role": "user", "content": user}], **more}


def picture(name: Any) -> list[dict[str, Any]]:
    """Return the content of a user message with one picture."""
    return [{"type": "image", "image": name}, {"type": "text", "text": "What is this?"}]


TEXT_ROW = chat("What is 1 + 1?")
SYSTEM = {"role": "system", "content": "Be brief."}
USER, ASSISTANT = TEXT_ROW["messages"]

# Lines of a file; what the sentence must name besides the line.
LINES: dict[str, tuple[str, str]] = {
    "no JSON": ("{messages: hello}", "json"),
    "half a line": ('{"messages": [{"role": "user", "content": "Wha', "json"),
    "a list": ("[1, 2]", "row"),
    "a number": ("5", "row"),
    "a text": ('"hello"', "row"),
    "null": ("null", "row"),
    "two objects": ('{"a": 1} {"a": 2}', "json"),
    "not a number": ('{"messages": [], "difficulty": NaN}', ""),
    "a trailing comma": ('{"messages": [],}', "json"),
    "a byte order mark in the middle": ("\ufeff" + json.dumps(TEXT_ROW), ""),
}

ROWS: dict[str, tuple[Any, str]] = {
    "no messages": ({"text": "hello"}, "rows.jsonl:2"),
    "messages that are null": ({"messages": None}, "messages"),
    "no message": ({"messages": []}, "messages"),
    "messages that are a text": ({"messages": "hello"}, "messages"),
    "a message that is a text": ({"messages": ["hello"]}, "messages[0]"),
    "a message without a role": ({"messages": [{"content": "hello"}]}, "role"),
    "an unknown role": ({"messages": [{"role": "robot", "content": "hello"}]}, "role"),
    "a role in capitals": ({"messages": [{"role": "User", "content": "hello"}, ASSISTANT]}, "role"),
    "a message without content": ({"messages": [{"role": "user"}, ASSISTANT]}, "content"),
    "content that is null": (chat(None), "content"),
    "content that is a number": (chat(5), "content"),
    "content that is empty": (chat(""), "content"),
    "content of white space": (chat("  \n"), "content"),
    "content without parts": (chat([]), "content"),
    "a part that is a text": (chat(["hello"]), "content[0]"),
    "a part of an unknown type": (chat([{"type": "sound", "sound": "a.wav"}]), "type"),
    "a part without a type": (chat([{"text": "hello"}]), "type"),
    "a text part without text": (chat([{"type": "text"}]), "text"),
    "a text part of a number": (chat([{"type": "text", "text": 3}]), "text"),
    "the assistant first": ({"messages": [ASSISTANT, USER]}, "alternate"),
    "two users": ({"messages": [USER, USER, ASSISTANT]}, "alternate"),
    "two assistants": ({"messages": [USER, ASSISTANT, ASSISTANT]}, "alternate"),
    "a system message last": ({"messages": [USER, ASSISTANT, SYSTEM]}, "alternate"),
    "a system message alone": ({"messages": [SYSTEM]}, "messages"),
    "an empty response": (chat("What?", ""), "content"),
    "a picture from the assistant": (chat("Draw.", picture("a.png")), "assistant"),
    "options that are a text": (chat("What?", options="A"), "options"),
    "options of lists": (chat("What?", options=[["A"], ["B"]]), "options"),
    "an answer that is a list": (chat("What?", answer=["2"]), "answer"),
    "an answer that is an object": (chat("What?", answer={"value": 2}), "answer"),
    "an answer that is true": (chat("What?", answer=True), "answer"),
    "an answer among no option": (chat("What?", answer="5", options=["1", "2"]), "answer"),
    "an answer past the options": (chat("What?", answer="E", options=["1", "2"]), "answer"),
    "a proof as the answer": (chat("What?", answer="Let n be even. " * 60), "answer"),
    "a difficulty that is a text": (chat("What?", difficulty="hard"), "difficulty"),
    "a source that is a list": (chat("What?", source=["a"]), "source"),
    "an id that is an object": (chat("What?", id={}), "id"),
    "a thought that never ends": (chat("What?", "<think>I wonder and wonder"), "think"),
    "two thoughts": (chat("What?", "<think>a</think><think>b</think>c"), "think"),
    "an image mark without an image": (chat("<image>What is this?"), "<image>"),
    "a video mark without a video": (chat("<video>What is this?"), "<video>"),
    "a vision token in the text": (chat("<|image_pad|>What?"), "image_pad"),
    "an image column": (chat("What?", images=["a.png"]), "image"),
    "an image column without marks": (chat("What?", image="a.png"), "image"),
    "a video column": (chat("What?", videos=["a.mp4"]), "video"),
    "an audio column": (chat("What?", audios=["a.wav"]), "audio"),
    "tools": (chat("What?", tools=[{"name": "search"}]), "tools"),
    "a thought beside the content": (
        {"messages": [USER, {"role": "assistant", "content": "2", "reasoning_content": 7}]},
        "reasoning_content",
    ),
    "a lone surrogate": (chat("What \ud800?"), ""),
}

PICTURES: dict[str, tuple[Any, str]] = {
    "a picture that is not there": (chat(picture("absent.png")), "absent.png"),
    "a picture outside of the root": (chat(picture("../../../../etc/passwd")), "image"),
    "an absolute path": (chat(picture("/etc/hostname")), "image"),
    "a picture on the web": (chat(picture("https://example.com/a.png")), "URL"),
    "a data link that is no picture": (chat(picture("data:image/png;base64,AAAA")), "decoded"),
    "a data link without base64": (chat(picture("data:image/svg+xml,<svg/>")), "URL"),
    "a file link outside of the root": (chat(picture("file:///etc/hostname")), "outside"),
    "a picture that is a number": (chat(picture(5)), "image"),
    "a picture without a name": (chat(picture("")), "image"),
    "a picture that is a folder": (chat(picture("folder")), "folder"),
    "a picture that is a text": (chat(picture("text.png")), "text.png"),
    "a picture that is empty": (chat(picture("empty.png")), "empty.png"),
    "half a picture": (chat(picture("half.png")), "half.png"),
    "bytes that are not base64": (chat(picture({"bytes": "###"})), "base64"),
    "bytes that are no picture": (chat(picture({"bytes": "aGVsbG8="})), "image"),
    "a picture that is too thin": (chat(picture("thin.png")), "thin.png"),
    "more pictures than allowed": (chat(picture("good.png") * 3), "max_images"),
    "a video of no frames": (chat([{"type": "video", "video": []}]), "video"),
    "a video of a name": (chat([{"type": "video", "video": "a.mp4"}]), "video"),
    "a video at no rate": (chat([{"type": "video", "video": ["good.png"], "fps": 0}]), "fps"),
    "a name with a null": (chat(picture("a\0.png")), "image"),
}

PROMPTS: dict[str, tuple[Any, str]] = {
    "no answer": (prompt("What is 1 + 1?"), "answer"),
    "an empty answer": (prompt("What is 1 + 1?", answer=" "), "answer"),
    "an answer of null": (prompt("What is 1 + 1?", answer=None), "answer"),
    "a proof": (prompt("Show it.", answer="Proof. By induction on n, it holds."), "answer"),
    "a picture that is not there": (prompt(picture("absent.png"), answer="2"), "absent.png"),
    "an image mark without an image": (prompt("<image>What?", answer="2"), "<image>"),
    "prompts that are all too long": (prompt("What is 1 + 1? " * 200, answer="2"), "max_prompt_tokens"),
}

SOURCES: dict[str, tuple[dict[str, str | bytes], str, str]] = {
    "a file that is not there": ({}, "rows.jsonl", "rows.jsonl"),
    "an empty file": ({"rows.jsonl": ""}, "rows.jsonl", "empty"),
    "a file of blank lines": ({"rows.jsonl": "\n  \n\t\n"}, "rows.jsonl", "no rows"),
    "a file of another encoding": ({"rows.jsonl": '{"a": "\xe9"}'.encode("latin-1")}, "rows.jsonl", "utf-8"),
    "a file in UTF-16": ({"rows.jsonl": json.dumps(TEXT_ROW).encode("utf-16")}, "rows.jsonl", "utf-8"),
    "a file of zeros": ({"rows.jsonl": bytes(200)}, "rows.jsonl", "rows.jsonl"),
    "an unknown suffix": ({"rows.csv": "a,b\n1,2\n"}, "rows.csv", "suffix"),
    "a parquet file that is a text": ({"rows.parquet": "hello"}, "rows.parquet", "rows.parquet"),
    "a parquet file that is empty": ({"rows.parquet": b""}, "rows.parquet", "rows.parquet"),
    "a JSON file that is an object": ({"rows.json": "{}"}, "rows.json", "rows.json"),
    "a JSON file of numbers": ({"rows.json": "[1, 2]"}, "rows.json", "rows.json"),
    "a JSON file cut short": ({"rows.json": '[{"messages": ['}, "rows.json", "json"),
    "a JSON file of an empty list": ({"rows.json": "[]"}, "rows.json", "no rows"),
    "a folder without files": ({"data/readme.txt": "hello"}, "data", "data"),
    "a name of the hub": ({}, "nobody/nothing", "nobody/nothing"),
    "a web address": ({}, "https://example.com/rows.jsonl", "example.com"),
    "a puzzle without a kind": ({}, "puzzle:", "puzzle"),
}

SMALL_FILES = ("folder/readme.txt", "text.png", "empty.png", "half.png", "thin.png", "good.png")


def pictures() -> dict[str, str | bytes]:
    """Return the files that the picture rows name."""
    files: dict[str, str | bytes] = {"folder/readme.txt": "hello", "text.png": "hello", "empty.png": b""}
    for name, size in (("good.png", (56, 56)), ("thin.png", (4000, 2))):
        buffer = io.BytesIO()
        Image.new("RGB", size, "grey").save(buffer, "PNG")
        files[name] = buffer.getvalue()
    whole = files["good.png"]
    assert isinstance(whole, bytes)
    files["half.png"] = whole[: len(whole) // 2]
    return files


def lines(row: Any) -> str:
    """Return a file whose second line is the row; the first is sound."""
    return f"{json.dumps(TEXT_ROW)}\n{row if isinstance(row, str) else json.dumps(row)}\n"


def cases() -> Iterator[Case]:
    """Yield every case of this file."""
    for name, (line, says) in LINES.items():
        yield Case("rows", name, (*TOKENISE, SOURCE), says or "rows.jsonl:2", {"rows.jsonl": lines(line)})
    for name, (row, says) in ROWS.items():
        yield Case("rows", name, (*TOKENISE, SOURCE), says or "rows.jsonl:2", {"rows.jsonl": lines(row)})
    for name, (row, says) in PICTURES.items():
        yield Case("rows", name, (*COLD_START, SOURCE), says, {**pictures(), "rows.jsonl": lines(row)})
    for name, (row, says) in PROMPTS.items():
        yield Case("rows", f"prompt: {name}", (*RL, SOURCE), says, {"rows.jsonl": json.dumps(row) + "\n"})
    for name, (files, path, says) in SOURCES.items():
        yield Case("sources", name, (*TOKENISE, f"data.sources=[{{path: '{substitute_folder(path)}'}}]"), says, files)


def substitute_folder(path: str) -> str:
    """Put relative names into the folder of the case; names of the hub, web addresses and puzzles stay."""
    return path if ":" in path or path == "nobody/nothing" else "{tmp}/" + path
