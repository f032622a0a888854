"""Questions to an OpenAI-compatible endpoint: retries with back-off, a limit of concurrency, a budget.

The key is read from an environment variable and handed to the client; it is cut out of every message of an error.
"""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import openai

from ovr_megatron.config import ConfigError
from ovr_megatron.curation.settings import TeacherConfig
from ovr_megatron.errors import UserError

_FATAL = (401, 402, 403, 404, 405)
_REFUSED = (400, 413, 422)
_SHOWN = 300  # characters of an answer that an error shows


class TeacherError(UserError, RuntimeError):
    """The teacher cannot be asked: no key, no access, no such model, or nothing but failures."""


class _TransientError(Exception):
    """A failure that the next attempt may not have; ``wait_s`` is what the server asked for."""

    def __init__(self, problem: str, wait_s: float = 0.0) -> None:
        super().__init__(problem)
        self.wait_s = wait_s


@dataclass(frozen=True)
class Question:
    """One request: its key in the journal, and messages in OpenAI's form."""

    key: int
    messages: list[dict[str, Any]]
    seed: int


@dataclass(frozen=True)
class Answer:
    """What came of a question: a text with its reason to end, or the ``error`` that it got; ``tokens`` in all."""

    key: int
    text: str | None = None
    thought: str | None = None
    finish: str = ""
    tokens: int = 0
    error: str | None = None
    final: bool = True  # whether asking again would be in vain


class Endpoint:
    """A chat endpoint within one run's budget.

    Attributes:
        requests: Attempts so far, those of earlier runs that got an answer included.
        tokens: Prompt and response tokens so far.
    """

    def __init__(self, config: TeacherConfig, requests: int = 0, tokens: int = 0, setting: str = "teacher.{}") -> None:
        """Read the key; ``requests`` and ``tokens`` are what earlier runs have spent.

        ``setting`` is how the user wrote a setting, for messages.

        Raises:
            ConfigError: the environment variable ``teacher.key_env`` is not set.
        """
        self._config, self._setting = config, setting
        self._key = os.environ.get(config.key_env or "", "")
        if config.key_env and not self._key:
            named = setting.format("key_env")
            raise ConfigError(f"{named}={config.key_env}: this environment variable is not set; export the key")
        self.requests, self.tokens = requests, tokens
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._client = openai.OpenAI(
            api_key=self._key or "none", base_url=config.base_url, timeout=config.timeout_s, max_retries=0
        )

    def ask(self, questions: Iterable[Question]) -> Iterator[Answer]:
        """Answers as they come, in any order; questions that the budget does not reach have none.

        Raises:
            TeacherError: the endpoint refuses us altogether, or the last questions have all failed.
        """
        failures = 0
        waiting: set[Future[Answer | None]] = set()
        pool = ThreadPoolExecutor(self._config.concurrency)
        try:
            for question in questions:
                if self.exhausted:
                    break
                waiting.add(pool.submit(self._persist, question))
                if len(waiting) < 2 * self._config.concurrency:
                    continue
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for answer in _answers(done):
                    failures = self._failures(failures, answer)
                    yield answer
            for answer in _answers(wait(waiting).done if waiting else ()):
                failures = self._failures(failures, answer)
                yield answer
        finally:
            self._stopped.set()
            pool.shutdown(cancel_futures=True)
            self._client.close()

    @property
    def exhausted(self) -> bool:
        """Whether the budget is spent."""
        config = self._config
        return bool(
            (config.max_requests and self.requests >= config.max_requests)
            or (config.max_total_tokens and self.tokens >= config.max_total_tokens)
        )

    def _failures(self, before: int, answer: Answer) -> int:
        failures = 0 if answer.final else before + 1
        if failures > max(8, self._config.concurrency):
            raise TeacherError(
                f"the last {failures} questions to {self._config.base_url} failed, {answer.error}; what was answered "
                f"is kept; correct {self._setting.format('*')} or wait, and run again"
            )
        return failures

    def _persist(self, question: Question) -> Answer | None:
        """Ask until there is an answer, at most ``attempts`` times; None where the budget ended before."""
        problem = ""
        for attempt in range(self._config.attempts):
            with self._lock:
                if self.exhausted or self._stopped.is_set():
                    return None
                self.requests += 1
            try:
                answer = self._once(question)
            except _TransientError as error:
                problem = str(error)
                pause = min(self._config.backoff_s * 2**attempt, self._config.max_backoff_s)
                self._stopped.wait(max(error.wait_s, pause * random.uniform(0.5, 1.0)))
                continue
            with self._lock:
                self.tokens += answer.tokens
            return answer
        return Answer(question.key, error=f"{self._config.attempts} attempts, the last: {problem}", final=False)

    def _once(self, question: Question) -> Answer:
        try:
            raw = self._client.chat.completions.with_raw_response.create(
                model=self._config.model or "",
                messages=question.messages,  # type: ignore[arg-type]
                temperature=self._config.temperature,
                max_tokens=self._config.max_tokens,
                seed=question.seed,
            )
        except openai.APIStatusError as error:
            problem = self._hush(f"HTTP {error.status_code}: {error.response.text[:_SHOWN]}")
            if error.status_code in _FATAL:
                self._stopped.set()
                raise TeacherError(
                    f"{self._config.base_url} refuses model {self._config.model!r}, {problem}; correct "
                    f"{', '.join(map(self._setting.format, ('base_url', 'model')))} or the key "
                    f"({self._setting.format('key_env')}={self._config.key_env})"
                ) from None
            if error.status_code in _REFUSED:
                return Answer(question.key, error=problem)
            raise _TransientError(problem, _retry_after(error.response.headers)) from None
        except openai.APIError as error:  # no connection, timeout
            raise _TransientError(self._hush(f"{type(error).__name__}: {error}")) from None
        return self._read(question.key, raw.text)

    def _read(self, key: int, text: str) -> Answer:
        try:
            told = json.loads(text)
            choice = told["choices"][0]
            message = choice["message"]
            content, thought = message.get("content"), message.get("reasoning_content") or message.get("reasoning")
            used = told.get("usage") or {}
            tokens = int(used.get("total_tokens") or len(text) // 4)
            if not isinstance(content, str) or not content.strip():
                raise ValueError("the content is empty")
            f"{content}{thought or ''}".encode()  # half a surrogate pair is no text
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            shown = self._hush(f"not a chat completion ({error!r}): {text[:_SHOWN]!r}")
            raise _TransientError(shown) from None
        return Answer(key, content, thought, str(choice.get("finish_reason") or ""), tokens)

    def _hush(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _answers(done: Iterable[Future[Answer | None]]) -> Iterator[Answer]:
    for future in done:
        answer = future.result()
        if answer is not None:
            yield answer


def _retry_after(headers: Any) -> float:
    try:
        return max(0.0, float(headers.get("retry-after", 0)))
    except ValueError:  # a date: back-off will do
        return 0.0
