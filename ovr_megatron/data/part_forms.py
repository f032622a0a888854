"""Parts of a message as OpenAI's interfaces and Transformers write them, beside our own form; images inside a text."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any

from ovr_megatron.data.schema import RowError

PART_KINDS = {
    "text": "text",
    "input_text": "text",  # these two and input_image: OpenAI's Responses
    "output_text": "text",
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "video": "video",
}
_MEDIUM_KEYS = ("image_url", "url", "path")  # in place of "image" and "video"; the last two are Transformers'
_DATA_URL = re.compile(r"data:image/[\w.+-]+(?:;[\w=.-]+)*;base64,")


def part_value(part: Mapping[str, Any], kind: str) -> tuple[str, Any]:
    """Return the key and the value of a part of our ``kind``; a medium may stand under another key."""
    if kind == "text" or part.get(kind) is not None:
        return kind, part.get(kind)
    for key in _MEDIUM_KEYS:
        value = part.get(key)
        if isinstance(value, Mapping):  # OpenAI's {"url": ..., "detail": ...}
            value = value.get("url")
        if value is not None:
            return key, value
    return kind, None


def data_url_content(text: str) -> str | None:
    """Return the base64 text of an image's ``data:`` URL, None of any other text."""
    match = _DATA_URL.match(text)
    return text[match.end() :] if match else None


def decode_base64(text: str, name: str, where: str, field: str) -> bytes:
    """Decode an image file; ``name`` says in errors what holds it.

    Raises:
        RowError: the text is not base64.
    """
    try:
        # Validated: without it, characters outside the alphabet would be skipped.
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        problem = f"{name} is not base64 ({error})"
        raise RowError(where, field, problem, "encode the image file anew") from error
