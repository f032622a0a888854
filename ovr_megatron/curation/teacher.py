"""Distillation: a teacher answers the prompt rows; rows that have a response pass.

Answers go to ``journal*.jsonl`` as they come, under a hash of model, messages, sampling and number of the sample, and
stay there for all later runs in the folder, with whatever settings: nothing is asked twice.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from ovr_megatron.curation.endpoint import Answer, Endpoint, Question
from ovr_megatron.curation.engines import engine_files, run_engines
from ovr_megatron.curation.journal import Journal
from ovr_megatron.curation.settings import PrepareConfig, TeacherConfig
from ovr_megatron.curation.stage import PrepareStage, Work, listing
from ovr_megatron.curation.text import response_text
from ovr_megatron.data.traces import continuation, convert, with_thought

JOURNAL = "journal.jsonl"
_FREE = ("base_url", "key_env", "concurrency", "backoff_s", "max_backoff_s", "timeout_s")


def run(work: Work) -> None:
    """Ask for every answer that the journal lacks, then write the rows in their order."""
    config = work.config.teacher
    with Journal(work.folder / JOURNAL) as journal:
        if config.base_url:
            failed = _ask_endpoint(work, journal)
        else:
            failed = {}
            run_engines(work, "answer")
            adopt(work.folder, journal)
        journal.reopen()
        for row in work.rows():
            _write(work, journal, failed, row)


def _ask_endpoint(work: Work, journal: Journal) -> dict[int, str]:
    """Fill the journal from the endpoint; returns the errors of questions that may be asked again another day."""
    config = work.config.teacher
    spent = sum(int(entry.get("tokens", 0)) for entry in journal) if config.max_total_tokens else 0
    endpoint = Endpoint(config, len(journal), spent)
    failed: dict[int, str] = {}
    for answer in endpoint.ask(_questions(work, journal)):
        if answer.final:
            journal.add(answer.key, {name: value for name, value in asdict(answer).items() if name != "key"})
        else:
            failed[answer.key] = answer.error or ""
        work.progress.update()
    work.extra["requests"], work.extra["tokens"] = endpoint.requests, endpoint.tokens
    return failed


def _questions(work: Work, journal: Journal) -> Iterator[Question]:
    asked: set[int] = set()
    for row in work.rows():
        if response_text(row) is None and not has_video(row):
            for sample in range(work.config.teacher.samples):
                key = question_key(work.config.teacher, row, sample)
                if key not in journal and key not in asked:
                    asked.add(key)
                    seed = (work.config.seed << 16) + sample
                    yield Question(key, openai_messages(row, Path(work.config.dir)), seed)


def adopt(folder: Path, journal: Journal) -> None:
    """Move what the engines' processes have written into the one journal."""
    for path in sorted(folder.glob("journal.*.jsonl")):
        with Journal(path) as part:
            for entry in part:
                journal.add(entry.pop("key"), entry)
        path.unlink()


def question_key(config: TeacherConfig, row: dict[str, Any], sample: int) -> int:
    """64 bits for what is asked: the same question to the same model with the same sampling has the same key."""
    told = [config.model, config.temperature, config.max_tokens, sample, row["messages"]]
    return int.from_bytes(hashlib.blake2b(json.dumps(told).encode(), digest_size=8).digest(), "big")


def has_video(row: dict[str, Any]) -> bool:
    """Whether a row holds a video, which no chat endpoint takes."""
    return any(
        part["type"] == "video" for m in row["messages"] if not isinstance(m["content"], str) for part in m["content"]
    )


def openai_messages(row: dict[str, Any], root: Path) -> list[dict[str, Any]]:
    """The messages of a row in OpenAI's form; images below ``root`` become data URLs."""
    return [{"role": m["role"], "content": _content(m["content"], root)} for m in row["messages"]]


def _content(content: Any, root: Path) -> Any:
    if isinstance(content, str):
        return content
    return [
        {"type": "image_url", "image_url": {"url": _data_url((root / part["image"]).read_bytes())}}
        if part["type"] == "image"
        else part
        for part in content
    ]


def _data_url(data: bytes) -> str:
    kind = Image.open(io.BytesIO(data)).get_format_mimetype()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _write(work: Work, journal: Journal, failed: dict[int, str], row: dict[str, Any]) -> None:
    config, source = work.config.teacher, row.get("source", "")
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
            _write_answer(work, row, Answer(**journal[key]), sample)


def _write_answer(work: Work, row: dict[str, Any], answer: Answer, sample: int) -> None:
    config, source = work.config.teacher, row.get("source", "")
    if answer.error is not None:
        work.drop(row, source, "refused by the teacher", error=answer.error)
    elif answer.finish == "length" and not config.keep_truncated:
        work.drop(row, source, "answer cut off")
    else:
        text = response_of(answer, work.config.data.template == "think")
        if not text.strip():
            work.drop(row, source, "empty answer")
            return
        name = f"{row.get('id', '')}#{sample}" if config.samples > 1 else row.get("id", "")
        messages = [*row["messages"], {"role": "assistant", "content": text}]
        work.keep({**row, "messages": messages, "id": name, "teacher": config.model}, source)


def response_of(answer: Answer, think: bool) -> str:
    """Thought and answer as one response: after an opened ``<think>`` where the template opens it."""
    text = with_thought(answer.thought, answer.text or "") if answer.thought else answer.text or ""
    return continuation(convert(text.lstrip())) if think else text


def inputs(config: PrepareConfig) -> object:
    """The files of a local teacher."""
    return None if config.teacher.base_url else listing(config.teacher.model or "")


def settings(config: PrepareConfig) -> list[Any]:
    """What decides the outcome; not how fast and through which door the teacher is asked."""
    told = {name: value for name, value in asdict(config.teacher).items() if name not in _FREE}
    return [told, config.data.template]


STAGE = PrepareStage("teacher", run, settings, inputs, engine_files("answer"))
