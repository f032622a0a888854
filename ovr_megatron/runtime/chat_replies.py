"""Read the replies of a chat endpoint, whose fields may be missing, of another type, or false."""

from __future__ import annotations

import datetime
import email.utils
import json
import math
from collections.abc import Callable
from typing import Any

from ovr_megatron.runtime.chat_messages import Completion

_FINISH = 40  # characters of the finish reason that are kept


class ReplyError(Exception):
    """A reply that is no chat completion; the message has its beginning."""


def read_completion(
    key: int,
    text: str,
    request_bytes: int,
    max_tokens: int,
    excerpt: Callable[[str], str],
) -> Completion:
    """Read a chat completion, any field of which may be missing or of another type.

    Args:
        key: Of the question.
        text: Body of the reply.
        request_bytes: Size of the request, which bounds the tokens that are counted.
        max_tokens: Tokens of an answer at most.
        excerpt: Returns the beginning of a foreign text as a message may show it.

    Raises:
        ReplyError: it is none.
    """
    try:
        body = json.loads(text)
        choice = body["choices"][0]
        message = choice["message"]
        content = message.get("content")
        thought = message.get("reasoning_content") or message.get("reasoning")
        if not isinstance(content, str) or not content.strip():
            raise ValueError("the content is empty")
        thought = thought if isinstance(thought, str) else None
        f"{content}{thought or ''}".encode()  # raises for half a surrogate pair, which no file could hold
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ReplyError(f"not a chat completion ({excerpt(repr(error))}): {excerpt(text)!r}") from None
    finish = choice.get("finish_reason")
    if not isinstance(finish, str):
        finish = ""
    tokens = _tokens(body.get("usage"), text, request_bytes, max_tokens)
    return Completion(key, content, thought, finish[:_FINISH], tokens)


def _tokens(usage: Any, text: str, request_bytes: int, max_tokens: int) -> int:
    """Return the endpoint's count of the tokens of question and answer, bounded by their sizes in bytes."""
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    if not isinstance(total, int) or isinstance(total, bool) or total <= 0:
        return len(text) // 4  # an estimate: about four characters make a token
    # No token is shorter than a byte: without a bound, one false count would end the budget.
    answer_bytes = max(len(text.encode()), max_tokens)
    return min(total, request_bytes + answer_bytes)


def retry_after(text: str) -> float:
    """Return the seconds of a ``Retry-After`` header, a number or a date; 0 for a text that is neither."""
    try:
        seconds = float(text)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(text)
            now = datetime.datetime.now(datetime.UTC)
            seconds = (date - now).total_seconds()
        except (ValueError, TypeError):  # no date, or one without a time zone
            return 0.0
    if not math.isfinite(seconds):
        return 0.0
    return max(0.0, seconds)
