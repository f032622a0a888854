"""Ask a judge: an OpenAI-compatible endpoint, a local model through vLLM, or for behaviours the wording of the text.

Every answer is appended to ``judge.jsonl`` at once, under a hash of judge and question.  A judge that dies, or a budget
that ends, costs only the questions that were not asked yet, and no question is asked twice.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TypedDict, cast

from ovr_megatron.config import ConfigError, DataConfig, ParallelConfig, RolloutConfig
from ovr_megatron.curation.stage import batches
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.row_parsing import parse_row
from ovr_megatron.evaluation import lexical
from ovr_megatron.evaluation.behaviours import BEHAVIOURS, VERSION, Behaviour, Trace, format_question, read_count
from ovr_megatron.evaluation.command import dtype_of
from ovr_megatron.evaluation.judge_settings import VLLM, JudgeConfig
from ovr_megatron.families import ModelShape
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.rollout.offline import Request, answer_rows
from ovr_megatron.runtime import distributed
from ovr_megatron.runtime.chat_messages import Question
from ovr_megatron.runtime.endpoint import Endpoint
from ovr_megatron.runtime.journal import Journal

JOURNAL = "judge.jsonl"
_BATCH = 256  # questions in one call of the local engine
_STORED_CHARACTERS = 500  # of the end of an answer, where the verdict is

KeyedQuestion = tuple[int, str]
"""Key of a question in the journal, and its text."""
OnResult = Callable[[int, Mapping[str, object]], None]
"""Called with the key of a question and the judge's result: a `JudgeEntry`, and ``final`` False to ask again."""


class JudgeEntry(TypedDict, total=False):
    """What the journal holds of an answer: the end of its text, the reason if there is none, and its tokens."""

    text: str | None
    error: str | None
    tokens: int


@dataclass
class Counts:
    """Counts of behaviours in traces.

    Attributes:
        by_behaviour: The counts of every trace, in order; None without a count.
        missing: Number of missing counts by reason.
    """

    by_behaviour: dict[str, list[int | None]]
    missing: Counter[str] = field(default_factory=Counter)


def count_behaviours(
    traces: Sequence[Trace],
    config: JudgeConfig,
    folder: Path,
    progress: Callable[[int], None],
) -> Counts:
    """Have every behaviour counted in every trace.

    Args:
        traces: The traces.
        config: The judge.
        folder: Folder of the journal.
        progress: Called with the number of counts that are complete.

    Raises:
        ConfigError: the judge cannot be opened, or its key is not set.
        EndpointError: the endpoint refuses us, or nothing but failures; the answers so far are on disk.
    """
    counts = Counts({name: [None] * len(traces) for name in BEHAVIOURS})
    if config.is_lexical:
        for index, trace in enumerate(traces):
            for name, occurrences in lexical.count(trace.reasoning).items():
                counts.by_behaviour[name][index] = occurrences
            progress(len(BEHAVIOURS))
        return counts
    questions: dict[int, str] = {}
    for trace in traces:
        for behaviour in BEHAVIOURS.values():
            questions[_key(config, behaviour, trace)] = format_question(behaviour, trace)
    # Equal traces have one key and are asked once.
    progress(len(traces) * len(BEHAVIOURS) - len(questions))
    answers = ask_judge(list(questions.items()), config, folder, progress)
    for index, trace in enumerate(traces):
        for name, behaviour in BEHAVIOURS.items():
            answer = answers[_key(config, behaviour, trace)]
            count = read_count(answer.text, trace)
            counts.by_behaviour[name][index] = count
            if count is None:
                counts.missing[answer.missing or "malformed"] += 1
    return counts


@dataclass(frozen=True)
class JudgeAnswer:
    """Text of a judge's answer; without one ``missing`` says why: refused, failed or not asked."""

    text: str = ""
    missing: str | None = None


def ask_judge(
    questions: Sequence[KeyedQuestion],
    config: JudgeConfig,
    folder: Path,
    progress: Callable[[int], None],
) -> dict[int, JudgeAnswer]:
    """Send the questions that have no answer in the journal of ``folder`` to the judge model.

    Returns:
        The answers to all questions, by key.

    Raises:
        ConfigError: the judge is no model, cannot be opened, or its key is not set.
        EndpointError: the endpoint refuses us, or nothing but failures; the answers so far are on disk.
    """
    if config.is_lexical:
        raise ConfigError("judge lexical counts words and answers no question; give vllm:FOLDER or URL#MODEL")
    with Journal(folder / JOURNAL) as journal:
        unanswered = [(key, text) for key, text in questions if key not in journal]
        progress(len(questions) - len(unanswered))
        failed: set[int] = set()

        def on_result(key: int, result: Mapping[str, object]) -> None:
            # A failure is not final: it stays out of the journal, and the next run asks again.
            if result.get("final", True):
                journal.add(key, {name: value for name, value in result.items() if name != "final"})
            else:
                failed.add(key)
            progress(1)

        if unanswered:
            send = _ask_vllm if config.judge.startswith(VLLM) else _ask_endpoint
            send(unanswered, config, journal, on_result)
        journal.reopen()  # lookups do not see added answers before
        answers: dict[int, JudgeAnswer] = {}
        for key, _ in questions:
            entry = cast(JudgeEntry, journal[key]) if key in journal else None
            answers[key] = _answer_from(entry, key in failed)
        return answers


def _answer_from(entry: JudgeEntry | None, failed: bool) -> JudgeAnswer:
    """Return the answer of a journal's entry, None for a question without one."""
    if entry is None:
        return JudgeAnswer(missing="failed" if failed else "not asked")
    if entry.get("error"):
        return JudgeAnswer(missing="refused")
    return JudgeAnswer(entry.get("text") or "")


def key_of(*fields: object) -> int:
    """Return a 64-bit hash of a question and its judge."""
    # Python's own hash of a text differs between processes; the journal needs the same key in every run.
    return int.from_bytes(hashlib.blake2b(json.dumps(fields).encode(), digest_size=8).digest(), "big")


def _key(config: JudgeConfig, behaviour: Behaviour, trace: Trace) -> int:
    return key_of(VERSION, config.judge, config.max_tokens, behaviour.name, trace.problem, trace.reasoning)


def _ask_endpoint(
    questions: Sequence[KeyedQuestion],
    config: JudgeConfig,
    journal: Journal,
    on_result: OnResult,
) -> None:
    base_url, _, model = config.judge.rpartition("#")
    settings = replace(config, base_url=base_url, model=model)
    # The journal holds the requests of earlier runs, which share the budget.
    spent_tokens = sum(int(entry.get("tokens", 0)) for entry in journal)
    endpoint = Endpoint(settings, len(journal), spent_tokens, setting="judge {}")
    endpoint_questions = (Question(key, [{"role": "user", "content": text}], 0) for key, text in questions)
    for answer in endpoint.ask(endpoint_questions):
        text = answer.text and answer.text[-_STORED_CHARACTERS:]
        result = {"text": text, "error": answer.error, "tokens": answer.tokens, "final": answer.final}
        on_result(answer.key, result)


def _ask_vllm(questions: Sequence[KeyedQuestion], config: JudgeConfig, journal: Journal, on_result: OnResult) -> None:
    processor, engine = _start_engine(Path(config.judge.removeprefix(VLLM)), config.max_tokens)
    for batch in batches(iter(questions), _BATCH):
        requests = []
        for key, text in batch:
            message = {"role": "user", "content": text}
            row = parse_row({"messages": [message]}, "a question", Path(), needs_answer=False)
            # At temperature 0 nothing is drawn: the seed does not matter.
            requests.append(Request(key, row, [0], config.sampling))
        for request, [generation] in answer_rows(engine, processor, requests, on_result):
            text = processor.decode(generation.tokens)[-_STORED_CHARACTERS:]
            on_result(request.key, {"text": text, "tokens": len(generation.tokens)})


@cache
def _start_engine(folder: Path, max_tokens: int) -> tuple[Processor, RolloutEngine]:
    """Start a local model, once in a process: vLLM holds its memory until the process ends."""
    shape = ModelShape.from_hf(folder)
    max_prompt_tokens = shape.max_positions - max_tokens
    if max_prompt_tokens < 1:
        raise ConfigError(f"{folder} takes {shape.max_positions} tokens, no room beside an answer of {max_tokens}")
    processor = Processor(folder, DataConfig(template="model", max_prompt_tokens=max_prompt_tokens))
    distributed.start(ParallelConfig(), seed=0)
    rollout = RolloutConfig(gpu_memory_utilization=0.85)
    return processor, RolloutEngine(folder, rollout, processor, dtype_of(folder), shape.max_positions)
