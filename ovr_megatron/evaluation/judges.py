"""Who judges: an OpenAI-compatible endpoint, a local model through vLLM, or for behaviours the wording of the text.

Answers are kept in ``judge.jsonl`` as they come, under a hash of judge and question: a judge that
dies, or a budget that ends, costs what was not asked yet, and nothing is asked twice.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ovr_megatron.config import ConfigError, DataConfig, ParallelConfig, RolloutConfig
from ovr_megatron.curation.endpoint import Endpoint, Question
from ovr_megatron.curation.journal import Journal
from ovr_megatron.curation.settings import TeacherConfig, check_endpoint, check_url
from ovr_megatron.curation.stage import batches
from ovr_megatron.data.processing import Processor, TooLongError
from ovr_megatron.data.schema import parse_row
from ovr_megatron.evaluation import lexical
from ovr_megatron.evaluation.behaviours import BEHAVIOURS, VERSION, Behaviour, Trace, question, read_count
from ovr_megatron.evaluation.command import dtype_of
from ovr_megatron.model.shape import ModelShape
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.rollout.sampling import Prompt
from ovr_megatron.runtime import distributed

LEXICAL, VLLM = "lexical", "vllm:"
JOURNAL = "judge.jsonl"
_AT_ONCE = 256
_SHOWN = 500  # characters of an answer that are kept

Ask = tuple[int, str]  # key and prompt
Told = Callable[[int, dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """A judge: ``lexical``, ``vllm:FOLDER`` or ``URL#MODEL``; the rest is for the latter two.

    ``key_env`` names the environment variable with the key, which goes over https unless ``allow_http``;
    ``max_requests`` and ``max_total_tokens`` are the budget of all runs that share a folder (0: none).
    """

    judge: str = LEXICAL
    key_env: str | None = None
    allow_http: bool = False
    max_tokens: int = 1024
    concurrency: int = 16
    attempts: int = 6
    backoff_s: float = 1.0
    max_backoff_s: float = 60.0
    timeout_s: float = 600.0
    max_requests: int = 0
    max_total_tokens: int = 0

    def __post_init__(self) -> None:
        if self.judge != LEXICAL and not self.judge.startswith(VLLM) and "#" not in self.judge:
            raise ConfigError(f"judge {self.judge!r} is none; give lexical, vllm:FOLDER or URL#MODEL")
        check_endpoint(self, "--{}")
        if self.judge != LEXICAL and not self.judge.startswith(VLLM):
            url = self.judge.rpartition("#")[0]
            check_url(url, "the judge's URL", bool(self.key_env), self.allow_http, "--allow-http")

    @property
    def is_lexical(self) -> bool:
        """Whether wording decides: an approximation."""
        return self.judge == LEXICAL


@dataclass
class Counts:
    """Counts of every trace by behaviour, None where there is none, and why not."""

    by_behaviour: dict[str, list[int | None]]
    missing: Counter[str] = field(default_factory=Counter)


def count(traces: Sequence[Trace], config: JudgeConfig, folder: Path, progress: Callable[[int], None]) -> Counts:
    """Have every trace judged for every behaviour.

    Raises:
        ConfigError: the judge cannot be opened, or its key is not set.
        TeacherError: the endpoint refuses us, or nothing but failures; what was answered is kept.
    """
    counts = Counts({name: [None] * len(traces) for name in BEHAVIOURS})
    if config.is_lexical:
        for at, trace in enumerate(traces):
            for name, found in lexical.count(trace.reasoning).items():
                counts.by_behaviour[name][at] = found
            progress(len(BEHAVIOURS))
        return counts
    asked = {_key(config, b, trace): (b, trace) for trace in traces for b in BEHAVIOURS.values()}
    progress(len(traces) * len(BEHAVIOURS) - len(asked))
    answers = ask([(key, question(*what)) for key, what in asked.items()], config, folder, progress)
    for at, trace in enumerate(traces):
        for name, behaviour in BEHAVIOURS.items():
            answer = answers[_key(config, behaviour, trace)]
            number = read_count(answer.text, trace)
            counts.by_behaviour[name][at] = number
            if number is None:
                counts.missing[answer.missing or "malformed"] += 1
    return counts


@dataclass(frozen=True)
class Answer:
    """What a judge said; without an answer ``missing`` says why: refused, failed or not asked."""

    text: str = ""
    missing: str | None = None


def ask(
    questions: Sequence[Ask], config: JudgeConfig, folder: Path, progress: Callable[[int], None]
) -> dict[int, Answer]:
    """Put every question to a judge that is a model, those that are not answered in ``folder`` already.

    Raises:
        ConfigError: the judge is none, cannot be opened, or its key is not set.
        TeacherError: the endpoint refuses us, or nothing but failures; what was answered is kept.
    """
    if config.is_lexical:
        raise ConfigError("judge lexical counts words and answers no question; give vllm:FOLDER or URL#MODEL")
    with Journal(folder / JOURNAL) as journal:
        todo = [(key, text) for key, text in questions if key not in journal]
        progress(len(questions) - len(todo))
        failed: set[int] = set()

        def told(key: int, result: dict[str, Any]) -> None:
            if result.pop("final", True):
                journal.add(key, result)
            else:
                failed.add(key)
            progress(1)

        if todo:
            put = _ask_vllm if config.judge.startswith(VLLM) else _ask_endpoint
            put(todo, config, journal, told)
        journal.reopen()
        return {key: _answer(journal[key] if key in journal else None, key in failed) for key, _ in questions}


def _answer(entry: dict[str, Any] | None, failed: bool) -> Answer:
    if entry is None:
        return Answer(missing="failed" if failed else "not asked")
    return Answer(missing="refused") if entry.get("error") else Answer(entry.get("text") or "")


def key_of(*told: object) -> int:
    """A number of 64 bits that stands for a question and for whom it is put to."""
    return int.from_bytes(hashlib.blake2b(json.dumps(told).encode(), digest_size=8).digest(), "big")


def _key(config: JudgeConfig, behaviour: Behaviour, trace: Trace) -> int:
    return key_of(VERSION, config.judge, config.max_tokens, behaviour.name, trace.problem, trace.reasoning)


def _ask_endpoint(todo: Sequence[Ask], config: JudgeConfig, journal: Journal, told: Told) -> None:
    base_url, _, model = config.judge.rpartition("#")
    settings = TeacherConfig(
        base_url=base_url,
        model=model,
        key_env=config.key_env,
        temperature=0.0,
        max_tokens=config.max_tokens,
        concurrency=config.concurrency,
        attempts=config.attempts,
        backoff_s=config.backoff_s,
        max_backoff_s=config.max_backoff_s,
        allow_http=config.allow_http,
        timeout_s=config.timeout_s,
        max_requests=config.max_requests,
        max_total_tokens=config.max_total_tokens,
    )
    spent = sum(int(entry.get("tokens", 0)) for entry in journal)
    endpoint = Endpoint(settings, len(journal), spent, setting="judge {}")
    questions = (Question(key, [{"role": "user", "content": text}], 0) for key, text in todo)
    for answer in endpoint.ask(questions):
        text = answer.text and answer.text[-_SHOWN:]
        told(answer.key, {"text": text, "error": answer.error, "tokens": answer.tokens, "final": answer.final})


def _ask_vllm(todo: Sequence[Ask], config: JudgeConfig, journal: Journal, told: Told) -> None:
    processor, engine = _local(Path(config.judge.removeprefix(VLLM)), config.max_tokens)
    for chunk in batches(iter(todo), _AT_ONCE):
        prompts, keys = [], []
        for key, text in chunk:
            row = parse_row({"messages": [{"role": "user", "content": text}], "answer": "-"}, "a question", Path())
            try:
                [sample] = processor.encode([row], generation=True)
            except TooLongError as error:
                told(key, {"error": f"{error.field}: {error.problem}"})
                continue
            prompts.append(Prompt(sample.prompt_tokens, seeds=[0], max_tokens=config.max_tokens))
            keys.append(key)
        for key, [found] in zip(keys, engine.generate(prompts, 0.0), strict=True):
            told(key, {"text": processor.decode(found.tokens)[-_SHOWN:], "tokens": len(found.tokens)})


@cache
def _local(folder: Path, max_tokens: int) -> tuple[Processor, RolloutEngine]:
    """A local model, started once: vLLM holds its memory until the process ends."""
    shape = ModelShape.from_hf(folder)
    longest = shape.max_positions - max_tokens
    if longest < 1:
        raise ConfigError(f"{folder} takes {shape.max_positions} tokens, no room beside an answer of {max_tokens}")
    processor = Processor(folder, DataConfig(template="model", max_prompt_tokens=longest))
    distributed.start(ParallelConfig(), seed=0)
    rollout = RolloutConfig(gpu_memory_utilization=0.85)
    return processor, RolloutEngine(folder, rollout, processor, dtype_of(folder), shape.max_positions)
