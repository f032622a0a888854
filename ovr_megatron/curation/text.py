"""Rows as words and hashed n-grams: what near-duplicate search and decontamination compare.

A text loses case, Unicode variants, thousands separators and LaTeX's dress before it is cut into words; letters and
digits make words, each CJK character is one.  64-bit hashes stand for n-grams: among 10**10 of them two differ with
equal hash in expectation.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\\,|\{,\}|\\!,\\!|,\\!)(?=\d{3}(?!\d))")
_DRESS = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|limits|qquad|quad|text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox|[bB]igg?[lr]?)"
    r"(?![a-zA-Z])|\\begin\{\w+\*?\}|\\end\{\w+\*?\}"
)
_FRACTION = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_MASK = " 0 "
_ODD = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER = np.uint64(0x5851F42D4C957F2D)


def normalise(text: str) -> str:
    """Lower case, one form of each character, no thousands separators, no LaTeX that only dresses."""
    text = unicodedata.normalize("NFKC", text).casefold()
    if "\\" in text:
        text = _FRACTION.sub(r"\\frac", _DRESS.sub(" ", text))
    return _THOUSANDS.sub("", text)


def words(normalised: str) -> list[str]:
    """Words of a text that `normalise` gave."""
    return _WORD.findall(normalised)


def numbers(normalised: str) -> list[str]:
    """Numbers of a text that `normalise` gave, in order."""
    return _NUMBER.findall(normalised)


def mask_numbers(normalised: str) -> str:
    """The text with every number replaced by one and the same."""
    return _NUMBER.sub(_MASK, normalised)


def mix(values: np.ndarray) -> np.ndarray:
    """Spread uint64 values over all 64 bits (the finaliser of SplitMix64); a bijection."""
    values = values + _ODD
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def word_hashes(items: Sequence[str]) -> np.ndarray:
    """uint64[n], one hash a word."""
    return mix(np.fromiter((zlib.crc32(item.encode()) for item in items), np.uint64, len(items)))


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """uint64[m - n + 1], a hash of every n words in a row of ``hashes`` uint64[m]; empty if m < n."""
    count = len(hashes) - n + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for k in range(n):
        total = total * _MULTIPLIER + hashes[k : k + count]
    return mix(total)


def hash_of(items: Sequence[str]) -> int:
    """One 64-bit hash of a sequence of texts."""
    return int(ngram_hashes(word_hashes(items), len(items))[0]) if items else 0


def prompt_text(row: Mapping[str, Any]) -> str:
    """The text of all messages but a final one of the assistant, of a row in JSON form."""
    messages = row["messages"]
    told = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    return "\n".join(content_text(message["content"]) for message in told)


def response_text(row: Mapping[str, Any]) -> str | None:
    """The text of the final assistant message, None in a prompt row."""
    last = row["messages"][-1]
    return content_text(last["content"]) if last["role"] == "assistant" else None


def content_text(content: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a message's content in JSON form, without images and videos."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def image_names(row: Mapping[str, Any]) -> Iterator[str]:
    """The stored images and frames of a row; their names are hashes of their content."""
    for message in row["messages"]:
        if not isinstance(message["content"], str):
            for part in message["content"]:
                yield from [part["image"]] if part["type"] == "image" else part.get("video", [])
