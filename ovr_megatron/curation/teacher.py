"""Distillation: a teacher answers the prompt rows; rows with a response pass.

Answers are written to ``journal*.jsonl`` as they arrive, under a hash of model, messages, sampling and sample index.
They stay there for all later runs in the folder, whatever their settings: nothing is asked twice.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import cast

from PIL import Image

from ovr_megatron.config.endpoint import TRANSPORT_FIELDS
from ovr_megatron.curation.engines import engine_files, run_engines
from ovr_megatron.curation.settings import PrepareConfig, TeacherConfig
from ovr_megatron.curation.stage import PrepareStage, Work, listing
from ovr_megatron.curation.text import response_text
from ovr_megatron.data.row_json import PartJson, RowJson
from ovr_megatron.data.traces import continuation, convert, with_thought
from ovr_megatron.runtime.chat_messages import ChatMessage, Completion, ImageUrlPart, Question
from ovr_megatron.runtime.endpoint import Endpoint
from ovr_megatron.runtime.journal import Journal

JOURNAL = "journal.jsonl"


def run(work: Work) -> None:
    """Ask for every answer that is missing in the journal, then write the rows in their order."""
    config = work.config.teacher
    with Journal(work.folder / JOURNAL) as journal:
        if config.base_url:
            failed = _ask_endpoint(work, journal)
        else:
            failed = {}
            run_engines(work, "answer")
            merge_journals(work.folder, journal)
        journal.reopen()
        for row in work.rows():
            _write_row(work, journal, failed, row)


def _ask_endpoint(work: Work, journal: Journal) -> dict[int, str]:
    """Fill the journal from the endpoint; return by key the errors of questions that may succeed later."""
    config = work.config.teacher
    spent = 0
    # Only a budget of tokens counts those of earlier runs; without one the journal need not be read.
    if config.max_total_tokens:
        spent = sum(int(entry.get("tokens", 0)) for entry in journal)
    endpoint = Endpoint(config, len(journal), spent)
    failed: dict[int, str] = {}
    for completion in endpoint.ask(_questions(work, journal)):
        if completion.final:
            fields = asdict(completion)
            journal.add(fields.pop("key"), fields)
        else:
            failed[completion.key] = completion.error or ""
        work.progress.update()
    work.extra["requests"] = endpoint.requests
    work.extra["tokens"] = endpoint.tokens
    return failed


def _questions(work: Work, journal: Journal) -> Iterator[Question]:
    """Yield the questions without a stored answer; a question that several rows share comes once."""
    keys: set[int] = set()
    for row in work.rows():
        if response_text(row) is not None or has_video(row):
            continue
        for sample in range(work.config.teacher.samples):
            key = question_key(work.config.teacher, row, sample)
            if key in journal or key in keys:
                continue
            keys.add(key)
            seed = (work.config.seed << 16) + sample
            messages = openai_messages(row, Path(work.config.dir))
            yield Question(key, messages, seed)


def merge_journals(folder: Path, journal: Journal) -> None:
    """Move the results of the engines' processes into ``journal``."""
    for path in sorted(folder.glob("journal.*.jsonl")):
        with Journal(path) as part:
            for entry in part:
                journal.add(entry.pop("key"), entry)
        path.unlink()  # last: after an interruption the results are in both, which does no harm


def question_key(config: TeacherConfig, row: RowJson, sample: int) -> int:
    """Return 64 bits that are equal for the same messages to the same model with the same sampling."""
    question = [
        config.model,
        config.temperature,
        config.max_tokens,
        sample,
        row["messages"],
    ]
    text = json.dumps(question)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def has_video(row: RowJson) -> bool:
    """Return whether a row holds a video, which no chat endpoint takes."""
    for message in row["messages"]:
        content = message["content"]
        if isinstance(content, str):
            continue
        if any(part["type"] == "video" for part in content):
            return True
    return False


def openai_messages(row: RowJson, root: Path) -> list[ChatMessage]:
    """Convert the messages of a row to OpenAI's form; images below ``root`` become data URLs."""
    messages = []
    for message in row["messages"]:
        content = _openai_content(message["content"], root)
        messages.append(ChatMessage(role=message["role"], content=content))
    return messages


def _openai_content(
    content: str | list[PartJson],
    root: Path,
) -> str | list[PartJson | ImageUrlPart]:
    if isinstance(content, str):
        return content
    parts: list[PartJson | ImageUrlPart] = []
    for part in content:
        if part["type"] != "image":
            parts.append(part)
            continue
        name = cast(str, part["image"])  # `collect` has stored every image as a file
        path = root / name
        url = _data_url(path.read_bytes())
        parts.append(ImageUrlPart(type="image_url", image_url={"url": url}))
    return parts


def _data_url(data: bytes) -> str:
    image = Image.open(io.BytesIO(data))
    media_type = image.get_format_mimetype()
    base64_data = base64.b64encode(data).decode()
    return f"data:{media_type};base64,{base64_data}"


def _write_row(
    work: Work,
    journal: Journal,
    failed: dict[int, str],
    row: RowJson,
) -> None:
    """Write a row with a response as it is, and a prompt row once for each sample of the teacher."""
    config = work.config.teacher
    source = row.get("source", "")
    if response_text(row) is not None:
        work.keep(row, source)
        return
    for sample in range(config.samples):
        key = question_key(config, row, sample)
        if has_video(row):
            work.drop(row, source, "video")
        elif key in failed:
            work.drop(row, source, "no answer", error=failed[key])
        elif key not in journal:
            work.drop(row, source, "over budget")
        else:
            completion = Completion(**journal[key])
            _write_completion(work, row, completion, sample)


def _write_completion(work: Work, row: RowJson, completion: Completion, sample: int) -> None:
    """Keep a prompt row with the teacher's answer as its response, or drop it."""
    config = work.config.teacher
    source = row.get("source", "")
    if completion.error is not None:
        work.drop(row, source, "refused by the teacher", error=completion.error)
        return
    if completion.finish == "length" and not config.keep_truncated:
        work.drop(row, source, "answer cut off")
        return
    think = work.config.data.template == "think"
    text = response_of(completion, think)
    if not text.strip():
        work.drop(row, source, "empty answer")
        return
    name = row.get("id", "")
    if config.samples > 1:
        name = f"{name}#{sample}"
    reply = {"role": "assistant", "content": text}
    answered_row: dict[str, object] = {
        **row,
        "messages": [*row["messages"], reply],
        "id": name,
        "teacher": config.model,
    }
    work.keep(answered_row, source)


def response_of(completion: Completion, think: bool) -> str:
    """Join thought and answer to one response; with ``think`` without the ``<think>`` that the template opens."""
    text = completion.text or ""
    if completion.thought:
        text = with_thought(completion.thought, text)
    if not think:
        return text
    trace = convert(text.lstrip())
    return continuation(trace)


def inputs(config: PrepareConfig) -> object:
    """Return a fingerprint of a local teacher's files."""
    teacher = config.teacher
    # The files of an endpoint's model are not ours to see.
    if teacher.base_url:
        return None
    return listing(teacher.model or "")


def settings(config: PrepareConfig) -> list[object]:
    """Return the settings on which the answers depend, without address, speed and time limits."""
    sampling = asdict(config.teacher)
    for name in TRANSPORT_FIELDS:
        del sampling[name]
    return [sampling, config.data.template]


STAGE = PrepareStage("teacher", run, settings, inputs, engine_files("answer"))
