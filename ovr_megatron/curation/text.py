"""Words and hashed n-grams of rows, which near-duplicate search and decontamination compare.

Case, Unicode variants, thousands separators and LaTeX formatting are removed before a text is cut into words.  Letters
and digits form words, and each CJK character is a word.  64-bit hashes stand for n-grams: among 10**10 distinct n-grams
two or three pairs collide.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from ovr_megatron.data.row_json import PartJson, RowJson

_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
# "10,000", also with LaTeX's spacing around the comma; no digit may follow the group of three.
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\\,|\{,\}|\\!,\\!|,\\!)(?=\d{3}(?!\d))")
# Commands that change the look of a formula and not its meaning.
_FORMATTING = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|limits|qquad|quad|text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox|[bB]igg?[lr]?)"
    r"(?![a-zA-Z])|\\begin\{\w+\*?\}|\\end\{\w+\*?\}"
)
_FRACTION = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_MASK = " 0 "
_INCREMENT = np.uint64(0x9E3779B97F4A7C15)  # of SplitMix64: 2**64 divided by the golden ratio, odd
_MULTIPLIER = np.uint64(0x5851F42D4C957F2D)  # of the polynomial hash of an n-gram (Knuth's MMIX)


def normalise(text: str) -> str:
    """Fold case and Unicode variants, and remove thousands separators and LaTeX formatting."""
    text = unicodedata.normalize("NFKC", text).casefold()
    # Most texts have no LaTeX; the look for a backslash saves them two substitutions.
    if "\\" in text:
        text = _FORMATTING.sub(" ", text)
        text = _FRACTION.sub(r"\\frac", text)
    return _THOUSANDS.sub("", text)


def words(normalised: str) -> list[str]:
    """Return the words of a normalised text."""
    return _WORD.findall(normalised)


def numbers(normalised: str) -> list[str]:
    """Return the numbers of a normalised text, in order."""
    return _NUMBER.findall(normalised)


def mask_numbers(normalised: str) -> str:
    """Replace every number of a normalised text by the same one."""
    return _NUMBER.sub(_MASK, normalised)


def mix(values: np.ndarray) -> np.ndarray:
    """Spread uint64 values over all 64 bits (the finaliser of SplitMix64); a bijection."""
    values = values + _INCREMENT
    # Shifts carry the high bits down, odd multipliers carry the low bits up; each step can be undone.
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values = values ^ (values >> np.uint64(27))
    values = values * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def word_hashes(items: Sequence[str]) -> np.ndarray:
    """Return uint64[n], one hash for each word."""
    # CRC-32 is fast and the same in every process, unlike Python's hash; `mix` spreads its 32 bits over 64.
    checksums = (zlib.crc32(item.encode()) for item in items)
    hashes = np.fromiter(checksums, np.uint64, len(items))
    return mix(hashes)


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """Return uint64[m - n + 1]: hashes of all n consecutive words of ``hashes`` uint64[m]; empty if m < n."""
    count = len(hashes) - n + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    ngrams = np.zeros(count, np.uint64)
    # A polynomial in the multiplier, modulo 2**64, so that the order of the words counts.
    for k in range(n):
        end = k + count
        ngrams = ngrams * _MULTIPLIER + hashes[k:end]
    return mix(ngrams)


def hash_of(items: Sequence[str]) -> int:
    """Return one 64-bit hash of a sequence of texts, 0 for an empty one."""
    if not items:
        return 0
    hashes = word_hashes(items)
    [sequence_hash] = ngram_hashes(hashes, len(items))
    return int(sequence_hash)


def prompt_text(row: RowJson) -> str:
    """Return the text of all messages of a row in JSON form, without a final message of the assistant."""
    messages = row["messages"]
    last = messages[-1]
    if last["role"] == "assistant":
        messages = messages[:-1]
    texts = [content_text(message["content"]) for message in messages]
    return "\n".join(texts)


def response_text(row: RowJson) -> str | None:
    """Return the text of the final assistant message, None for a prompt row."""
    last = row["messages"][-1]
    if last["role"] != "assistant":
        return None
    return content_text(last["content"])


def content_text(content: str | Sequence[PartJson]) -> str:
    """Return the text of a message's content in JSON form, without images and videos."""
    if isinstance(content, str):
        return content
    texts = [part.get("text", "") for part in content]
    return "".join(texts)


def image_names(row: RowJson) -> Iterator[str]:
    """Yield the names of a row's stored images and video frames, which are hashes of their content."""
    for message in row["messages"]:
        content = message["content"]
        if isinstance(content, str):
            continue
        for part in content:
            if part["type"] == "image":
                yield str(part["image"])
            else:
                yield from map(str, part.get("video", []))
