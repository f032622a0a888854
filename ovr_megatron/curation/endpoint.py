"""Questions to an OpenAI-compatible endpoint: retries with back-off, a limit of concurrency, a budget.

The key is read from an environment variable and handed to the endpoint; it is cut out of every message of an error.
An endpoint is trusted with nothing: its time, its size and its numbers are bounded, and its text is data.
"""

from __future__ import annotations

import datetime
import email.utils
import json
import math
import os
import random
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import httpx

from ovr_megatron.config import ConfigError
from ovr_megatron.curation.settings import TeacherConfig
from ovr_megatron.errors import UserError
from ovr_megatron.runtime.terminal import printable

_FATAL = (401, 402, 403, 404, 405)
_REFUSED = (400, 413, 422)
_SHOWN = 300  # characters of an answer that an error shows
_FINISH = 40  # characters of the reason to end
_TICK_S = 0.5  # until a request notices that all stops
_ENVELOPE_BYTES = 1 << 20  # of an answer, beside its text
_TOKEN_BYTES = 256  # of a token at most, escapes included


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


@dataclass(frozen=True)
class _Reply:
    """What the endpoint sent, whole."""

    status: int
    headers: Mapping[str, str]
    text: str


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
            ConfigError: the environment variable ``teacher.key_env`` is not set, or is no key.
        """
        self._config, self._setting = config, setting
        self._key = os.environ.get(config.key_env or "", "").strip()
        named = setting.format("key_env")
        if config.key_env and not self._key:
            raise ConfigError(f"{named}={config.key_env}: this environment variable is not set; export the key")
        if not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError(f"{named}={config.key_env}: the key has characters that no header takes; export it anew")
        url = httpx.URL(config.base_url or "")
        self._url = url.copy_with(path=f"{url.path.rstrip('/')}/chat/completions")
        self.requests, self.tokens = requests, tokens
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        # A redirect would carry the key elsewhere.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=config.concurrency)
        self._client = httpx.Client(headers=headers, timeout=config.timeout_s, follow_redirects=False, limits=limits)
        self._most_bytes = _ENVELOPE_BYTES + _TOKEN_BYTES * config.max_tokens

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
        problem, config = "", self._config
        for attempt in range(config.attempts):
            with self._lock:
                if self.exhausted or self._stopped.is_set():
                    return None
                self.requests += 1
            try:
                answer = self._once(question)
            except _TransientError as error:
                problem = str(error)
                pause = min(config.backoff_s * 2.0 ** min(attempt, 64), config.max_backoff_s)
                self._stopped.wait(max(min(error.wait_s, config.max_backoff_s), pause * random.uniform(0.5, 1.0)))
                continue
            with self._lock:
                self.tokens += answer.tokens
            return answer
        return Answer(question.key, error=f"{config.attempts} attempts, the last: {problem}", final=False)

    def _once(self, question: Question) -> Answer:
        body = {
            "model": self._config.model or "",
            "messages": question.messages,
            "temperature": self._config.temperature,
            "max_tokens": self._config.max_tokens,
            "seed": question.seed,
        }
        request = json.dumps(body).encode()
        reply = self._within_time(request)
        if 200 <= reply.status < 300:
            return self._read(question.key, reply.text, len(request))
        problem = f"HTTP {reply.status}: {self._excerpt(reply.text)}"
        if reply.status in _FATAL or 300 <= reply.status < 400:
            self._stopped.set()
            leads = " (it leads elsewhere: give that address)" if reply.status < 400 else ""
            raise TeacherError(
                f"{self._config.base_url} refuses model {self._config.model!r}, {problem}{leads}; correct "
                f"{', '.join(map(self._setting.format, ('base_url', 'model')))} or the key "
                f"({self._setting.format('key_env')}={self._config.key_env})"
            )
        if reply.status in _REFUSED:
            return Answer(question.key, error=problem)
        raise _TransientError(problem, retry_after(reply.headers.get("retry-after", "")))

    def _within_time(self, request: bytes) -> _Reply:
        """Post ``request`` and return the reply, at the latest ``timeout_s`` seconds from now.

        The client's own time-out counts from byte to byte, so that an endpoint which drips would hold it for ever.
        Whoever is late goes on in a thread of its own, which nothing waits for.
        """
        replies: list[_Reply | Exception] = []

        def post() -> None:
            try:
                replies.append(self._post(request, time.monotonic() + self._config.timeout_s))
            except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError, RuntimeError) as error:
                replies.append(error)

        thread = threading.Thread(target=post, daemon=True)
        thread.start()
        until = time.monotonic() + self._config.timeout_s
        while thread.is_alive() and time.monotonic() < until and not self._stopped.is_set():
            thread.join(min(_TICK_S, max(until - time.monotonic(), 0.0)))
        if not replies:
            raise _TransientError(f"no whole answer after {self._config.timeout_s:g} s")
        if isinstance(replies[0], Exception):
            raise _TransientError(f"{type(replies[0]).__name__}: {self._excerpt(str(replies[0]))}")
        return replies[0]

    def _post(self, request: bytes, until: float) -> _Reply:
        with self._client.stream("POST", self._url, content=request) as response:
            data = bytearray()
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > self._most_bytes:
                    raise httpx.ReadError(f"the answer is longer than {self._most_bytes:,} bytes")
                if time.monotonic() > until:
                    raise httpx.ReadTimeout("the answer takes too long")
        return _Reply(response.status_code, response.headers, data.decode("utf-8", "replace"))

    def _read(self, key: int, text: str, request_bytes: int) -> Answer:
        try:
            told = json.loads(text)
            choice = told["choices"][0]
            message = choice["message"]
            content, thought = message.get("content"), message.get("reasoning_content") or message.get("reasoning")
            if not isinstance(content, str) or not content.strip():
                raise ValueError("the content is empty")
            thought = thought if isinstance(thought, str) else None
            f"{content}{thought or ''}".encode()  # half a surrogate pair is no text
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            shown = f"not a chat completion ({self._excerpt(repr(error))}): {self._excerpt(text)!r}"
            raise _TransientError(shown) from None
        tokens = self._tokens(told.get("usage"), text, request_bytes)
        finish = choice.get("finish_reason")
        return Answer(key, content, thought, finish[:_FINISH] if isinstance(finish, str) else "", tokens)

    def _tokens(self, usage: Any, text: str, request_bytes: int) -> int:
        """Tokens of a question and its answer as the endpoint counts them, within what their sizes allow."""
        total = usage.get("total_tokens") if isinstance(usage, dict) else None
        if not isinstance(total, int) or isinstance(total, bool) or total <= 0:
            return len(text) // 4
        return min(total, request_bytes + max(len(text.encode()), self._config.max_tokens))

    def _excerpt(self, text: str) -> str:
        """The beginning of a foreign text, without the key and without control characters."""
        return printable(text.replace(self._key, "***") if self._key else text)[:_SHOWN]


def _answers(done: Iterable[Future[Answer | None]]) -> Iterator[Answer]:
    for future in done:
        answer = future.result()
        if answer is not None:
            yield answer


def retry_after(text: str) -> float:
    """Return the seconds of a ``Retry-After`` header, a number or a date; 0 for none, or for what is neither."""
    try:
        seconds = float(text)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(text)
            seconds = (date - datetime.datetime.now(datetime.UTC)).total_seconds()
        except (ValueError, TypeError):  # no date, or one without a time zone
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
