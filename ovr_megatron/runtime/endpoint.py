"""Client of an OpenAI-compatible chat endpoint: retries with back-off, bounded concurrency, a budget.

The key is read from an environment variable and sent to the endpoint only; it is removed from every error message.
The endpoint is not trusted: the time and size of its replies and the numbers in them are bounded, its text is data.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import httpx

from ovr_megatron.config import ConfigError
from ovr_megatron.config.endpoint import EndpointConfig
from ovr_megatron.errors import UserError
from ovr_megatron.runtime.chat_messages import Completion, Question
from ovr_megatron.runtime.chat_replies import ReplyError, read_completion, retry_after
from ovr_megatron.runtime.terminal import printable

_FATAL = (401, 402, 403, 404, 405)  # HTTP statuses after which every other question would fail, too
_REFUSED = (400, 413, 422)  # HTTP statuses that concern this question only
_EXCERPT = 300  # characters of a reply that an error message shows
_TICK_S = 0.5  # seconds until a waiting request notices that the client stops
_ENVELOPE_BYTES = 1 << 20  # of a reply, beside its text
_TOKEN_BYTES = 256  # of a token at most, escapes included


class EndpointError(UserError, RuntimeError):
    """The endpoint cannot be reached or refuses: no key, no access, no such model, or nothing but failures."""


class _TransientError(Exception):
    """A failure that the next attempt may not have; ``wait_s`` is the wait that the server demands."""

    def __init__(self, problem: str, wait_s: float = 0.0) -> None:
        super().__init__(problem)
        self.wait_s = wait_s


@dataclass(frozen=True)
class _HttpReply:
    """A complete HTTP reply."""

    status: int
    headers: Mapping[str, str]
    text: str


class Endpoint:
    """A chat endpoint within one run's budget.

    Attributes:
        requests: Attempts so far, including those of earlier runs that got an answer.
        tokens: Prompt and response tokens so far.
    """

    def __init__(
        self,
        config: EndpointConfig,
        requests: int = 0,
        tokens: int = 0,
        setting: str = "teacher.{}",
        pause_s: float = 0.0,
    ) -> None:
        """Read the key.

        Args:
            config: Its settings.
            requests: Attempts of earlier runs.
            tokens: Tokens of earlier runs.
            setting: Pattern by which messages name a setting, as the user wrote it.
            pause_s: Seconds without an attempt after as many failures in a row as end `ask`; questions fail at once
                meanwhile.

        Raises:
            ConfigError: the environment variable ``key_env`` is not set, or is no key.
        """
        self._config = config
        self._setting = setting
        key = os.environ.get(config.key_env or "", "")
        self._key = key.strip()
        key_setting = f"{setting.format('key_env')}={config.key_env}"
        if config.key_env and not self._key:
            raise ConfigError(f"{key_setting}: this environment variable is not set; export the key")
        if not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError(f"{key_setting}: the key has characters that no header takes; export it anew")
        url = httpx.URL(config.base_url or "")
        path = url.path.rstrip("/")
        self._url = url.copy_with(path=f"{path}/chat/completions")
        self.requests = requests
        self.tokens = tokens
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._no_retries = threading.Event()  # set by `_stop` and `drain`; ends the back-off
        self._pause_s = pause_s
        self._paused_until = 0.0
        self._failures = 0  # in a row
        self._last_problem = ""
        self._pool = ThreadPoolExecutor(config.concurrency)  # starts a thread when there is work for it
        self._headers = {
            "content-type": "application/json",
            "accept-encoding": "identity",  # compressed, a small reply could fill the memory
        }
        if self._key:
            self._headers["authorization"] = f"Bearer {self._key}"
        # Each thread has a client of its own: one for all looks through all of its connections at every request, which
        # at hundreds of them takes longer than the request.
        self._local = threading.local()
        self._clients: set[httpx.Client] = set()  # without those of requests that took too long, which end on their own
        self._certificates = httpx.create_ssl_context()
        self._max_bytes = _ENVELOPE_BYTES + _TOKEN_BYTES * config.max_tokens

    def ask(self, questions: Iterable[Question]) -> Iterator[Completion]:
        """Yield completions as they arrive, in any order; questions beyond the budget have none.

        Raises:
            EndpointError: the endpoint refuses all questions, or the last ones have all failed.
        """
        failures = 0
        pending: set[Future[Completion | None]] = set()
        try:
            for question in questions:
                if self.exhausted:
                    break
                pending.add(self.submit(question))
                # Twice the concurrency: the threads stay busy, and few questions with their images are in memory.
                if len(pending) < 2 * self._config.concurrency:
                    continue
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for completion in _completions(done, pending):
                    failures = self._count_failures(failures, completion)
                    yield completion
            for completion in _completions(wait(pending).done if pending else ()):
                failures = self._count_failures(failures, completion)
                yield completion
        finally:
            # Also when the caller stops early: without it the threads would go on with their attempts.
            self._stop()
            self._pool.shutdown(cancel_futures=True)
            self._close_clients()

    def submit(self, question: Question) -> Future[Completion | None]:
        """Have a question asked; the result is None where the budget ends before it is.

        The future raises `EndpointError` where the endpoint refuses all questions.
        """
        return self._pool.submit(self._persist, question)

    def drain(self, timeout_s: float) -> None:
        """Cancel questions that wait, and give those in flight ``timeout_s`` seconds, but no further attempt."""
        self._no_retries.set()
        # The pool's own wait, which also covers the callbacks of the futures, has no limit.
        thread = threading.Thread(target=self._pool.shutdown, kwargs={"cancel_futures": True}, daemon=True)
        thread.start()
        thread.join(timeout_s)
        self._stop()
        self._close_clients()

    def _stop(self) -> None:
        """End the waits of all threads, for a reply or for the next attempt."""
        self._stopped.set()
        self._no_retries.set()

    def _close_clients(self) -> None:
        with self._lock:
            clients = list(self._clients)
            self._clients.clear()
        for client in clients:
            client.close()

    @property
    def exhausted(self) -> bool:
        """Return whether the budget is spent."""
        config = self._config
        if config.max_requests and self.requests >= config.max_requests:
            return True
        if config.max_total_tokens and self.tokens >= config.max_total_tokens:
            return True
        return False

    def _count_failures(self, previous: int, completion: Completion) -> int:
        """Return the number of failures in a row, given that before ``completion``."""
        failures = 0 if completion.final else previous + 1
        if failures > self._most_failures:
            raise EndpointError(
                f"the last {failures} questions to {self._config.base_url} failed, {completion.error}; what was "
                f"answered is kept; correct {self._setting.format('*')} or wait, and run again"
            )
        return failures

    @property
    def _most_failures(self) -> int:
        return max(8, self._config.concurrency)

    def _persist(self, question: Question) -> Completion | None:
        """Ask until there is an answer, at most ``attempts`` times; return None if the budget ended before."""
        with self._lock:
            paused_s = self._paused_until - time.monotonic()
            last_problem = self._last_problem
        if paused_s > 0.0:
            error = f"not asked for another {paused_s:.0f} s after failures in a row, the last: {last_problem}"
            return Completion(question.key, error=error, final=False)
        completion = self._attempt_repeatedly(question)
        if completion is not None and self._pause_s:
            self._pause_after_failures(completion)
        return completion

    def _pause_after_failures(self, completion: Completion) -> None:
        with self._lock:
            if completion.final:
                self._failures = 0
                return
            self._failures += 1
            self._last_problem = completion.error or ""
            if self._failures >= self._most_failures:
                # One more failure after the pause begins the next.
                self._failures = self._most_failures - 1
                self._paused_until = time.monotonic() + self._pause_s

    def _attempt_repeatedly(self, question: Question) -> Completion | None:
        config = self._config
        problem = ""
        attempts = 0
        # A loop of our own: each attempt counts in the budget, a reply that is no completion is one more failure, and a
        # stop ends the wait. httpx retries connections only, and openai's client counts nothing and sleeps on.
        while attempts < config.attempts:
            with self._lock:  # threads share the counts, and none may start an attempt beyond the budget
                if self._stopped.is_set():
                    return None
                if attempts and self._no_retries.is_set():
                    break
                if self.exhausted:
                    return None
                self.requests += 1
            try:
                completion = self._attempt(question)
            except _TransientError as error:
                problem = str(error)
                factor = 2.0 ** min(attempts, 64)  # a larger exponent would overflow a float in the end
                attempts += 1
                backoff_s = min(config.backoff_s * factor, config.max_backoff_s)
                # Jitter, so that threads that failed together do not return together.
                backoff_s *= random.uniform(0.5, 1.0)
                demanded_s = min(error.wait_s, config.max_backoff_s)
                self._no_retries.wait(max(demanded_s, backoff_s))
                continue
            with self._lock:
                self.tokens += completion.tokens
            return completion
        return Completion(
            question.key,
            error=f"{attempts} attempt{'s' if attempts > 1 else ''}, the last: {problem}",
            final=False,
        )

    def _attempt(self, question: Question) -> Completion:
        """Send a question once.

        Raises:
            _TransientError: another attempt may succeed.
            EndpointError: no question would succeed.
        """
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
            try:
                return read_completion(question.key, reply.text, len(request), self._config.max_tokens, self._excerpt)
            except ReplyError as error:
                raise _TransientError(str(error)) from None
        problem = f"HTTP {reply.status}: {self._excerpt(reply.text)}"
        if reply.status in _FATAL or 300 <= reply.status < 400:
            self._stop()
            redirect = ""
            if reply.status < 400:
                redirect = " (it leads elsewhere: give that address)"
            settings = ", ".join(map(self._setting.format, ("base_url", "model")))
            raise EndpointError(
                f"{self._config.base_url} refuses model {self._config.model!r}, {problem}{redirect}; correct "
                f"{settings} or the key ({self._setting.format('key_env')}={self._config.key_env})"
            )
        if reply.status in _REFUSED:
            return Completion(question.key, error=problem)
        wait_s = retry_after(reply.headers.get("retry-after", ""))
        raise _TransientError(problem, wait_s)

    def _within_time(self, request: bytes) -> _HttpReply:
        """Post ``request`` and return the reply, at the latest ``timeout_s`` seconds from now.

        The client's own time-out counts from byte to byte, so an endpoint that sends a byte now and then would hold it
        for ever.  A late request goes on in its own daemon thread, which closes its client and for which nothing waits.
        """
        replies: list[_HttpReply | Exception] = []
        timeout_s = self._config.timeout_s
        client = self._client()

        def post() -> None:
            result: _HttpReply | Exception
            try:
                reply_deadline = time.monotonic() + timeout_s
                result = self._post(client, request, reply_deadline)
            except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError, RuntimeError) as error:
                result = error
            with self._lock:
                replies.append(result)
                is_late = client not in self._clients
            if is_late:
                client.close()

        thread = threading.Thread(target=post, daemon=True)
        thread.start()
        deadline = time.monotonic() + timeout_s
        while thread.is_alive() and not self._stopped.is_set():
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0.0:
                break
            thread.join(min(_TICK_S, remaining_s))
        with self._lock:  # the reply may come at this moment
            is_late = not replies
            if is_late:
                self._clients.discard(client)
        late = _TransientError(f"no whole answer after {timeout_s:g} s")
        if is_late:
            del self._local.client  # the late request still uses it
            raise late
        [reply] = replies
        # The client's own time-out ends at nearly the same moment: either may come first.
        if isinstance(reply, httpx.TimeoutException):
            raise late
        if isinstance(reply, Exception):
            message = self._excerpt(str(reply))
            raise _TransientError(f"{type(reply).__name__}: {message}")
        return reply

    def _client(self) -> httpx.Client:
        """Return this thread's client."""
        client: httpx.Client | None = getattr(self._local, "client", None)
        if client is None:
            client = httpx.Client(
                headers=self._headers,
                timeout=self._config.timeout_s,
                follow_redirects=False,  # they would carry the key to another host
                verify=self._certificates,
            )
            self._local.client = client
            with self._lock:
                self._clients.add(client)
        return client

    def _post(self, client: httpx.Client, request: bytes, deadline: float) -> _HttpReply:
        with client.stream("POST", self._url, content=request) as response:
            data = bytearray()
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > self._max_bytes:
                    raise httpx.ReadError(f"the answer is longer than {self._max_bytes:,} bytes")
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the answer takes too long")
        text = data.decode("utf-8", "replace")
        return _HttpReply(response.status_code, response.headers, text)

    def _excerpt(self, text: str) -> str:
        """Return the beginning of a foreign text, without the key and without control characters."""
        if self._key:
            text = text.replace(self._key, "***")
        return printable(text)[:_EXCERPT]


def _completions(
    done: Collection[Future[Completion | None]],
    pending: Collection[Future[Completion | None]] = (),
) -> Iterator[Completion]:
    """Yield completions of ``done``, answers first; with an error there also what ``pending`` has, then raise it.

    An answer is paid for: it must not be lost to the refusal or the failure of another question.
    """
    errors = [error for error in (future.exception() for future in done) if error]
    if errors:
        done = [*done, *(future for future in pending if future.done())]
    completions = []
    for future in done:
        completion = None if future.exception() else future.result()
        if completion is not None:
            completions.append(completion)
    yield from sorted(completions, key=lambda completion: not completion.final)
    if errors:
        raise errors[0]
