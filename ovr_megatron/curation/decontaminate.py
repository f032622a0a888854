"""Decontamination: drop rows that repeat an evaluation problem, by word n-grams.

A problem is recognised verbatim, re-cased, edited, or inside a longer prompt.  A row is compared by the share of a
problem's distinct n-grams that it contains; this share does not depend on the row's other words, so a longer prompt
hides nothing.  An edited word costs n n-grams.  A problem with images matches only a row that has one of its images,
pixel for pixel: many problems with images share their question.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ovr_megatron.config import ConfigError
from ovr_megatron.curation.settings import DecontaminateConfig, PrepareConfig
from ovr_megatron.curation.stage import PrepareStage, Work, listing
from ovr_megatron.curation.text import (
    content_text,
    image_names,
    mask_numbers,
    ngram_hashes,
    normalise,
    response_text,
    word_hashes,
    words,
)
from ovr_megatron.data.images import load_image, load_media
from ovr_megatron.data.row_json import MessageJson, RowJson
from ovr_megatron.data.schema import BOX_REQUEST, ENDLESS, LETTER_REQUEST, ImagePart
from ovr_megatron.data.sources import open_source

PLAIN_MATCH = "evaluation problem"
MASKED_MATCH = "evaluation problem with other numbers"

_EDIT = 4  # an edited word must not cost more than about a quarter of a short problem's n-grams
_SHORTEST = 4


@dataclass(frozen=True)
class NgramTable:
    """The n-grams of all problems that are cut into n-grams of the same length.

    Attributes:
        n: Words of an n-gram.
        short: Whether the problems have fewer than ``min_words`` words.  Such a problem is one n-gram, and matches only
            a text of which it is at least half.
        hashes: uint64[g], ascending and distinct.
        starts: int64[g + 1]; n-gram i occurs in ``problems[starts[i] : starts[i + 1]]``.
        problems: int32, indices of problems.
    """

    n: int
    short: bool
    hashes: np.ndarray
    starts: np.ndarray
    problems: np.ndarray


@dataclass(frozen=True)
class NgramIndex:
    """An index from n-grams to evaluation problems.

    Attributes:
        sizes: int64[p], number of distinct n-grams of each problem.
        tables: One table for each length of n-gram.
        threshold: Share of a problem's n-grams that makes a match.
    """

    sizes: np.ndarray
    tables: tuple[NgramTable, ...]
    threshold: float

    def find(self, hashes: np.ndarray) -> list[tuple[float, int]]:
        """Find the problems that match a text of word ``hashes``; return (share, index), the largest share first."""
        matches: list[tuple[float, int]] = []
        for table in self.tables:
            if table.short and 2 * table.n < len(hashes):
                continue
            text_ngrams = np.unique(ngram_hashes(hashes, table.n))
            positions = _positions(table.hashes, text_ngrams)
            if not len(positions):
                continue
            occurrences = []
            for i in positions:
                start = table.starts[i]
                end = table.starts[i + 1]
                occurrences.append(table.problems[start:end])
            all_occurrences = np.concatenate(occurrences)
            problems, counts = np.unique(all_occurrences, return_counts=True)
            # Hashes are distinct in the table and in the text, so counts are numbers of distinct n-grams.
            shares = counts / self.sizes[problems]
            is_match = shares >= self.threshold
            match_shares = shares[is_match].tolist()
            match_problems = problems[is_match].tolist()
            matches += zip(match_shares, match_problems, strict=True)
        return sorted(matches, reverse=True)


IndexedHashes = tuple[int, np.ndarray]  # index of a problem, and its distinct n-grams


def _positions(table: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Return the positions in ``table``, ascending, of those of ``hashes`` that it contains."""
    positions = np.searchsorted(table, hashes)
    # A hash above all of the table's gets the position behind the last, which is no index.
    indices = np.minimum(positions, len(table) - 1)
    candidates = table[indices]
    return positions[candidates == hashes]


def build_index(texts: list[str], config: DecontaminateConfig, masked: bool) -> NgramIndex:
    """Index problems by their questions; with ``masked`` all numbers count as equal."""
    sizes = np.ones(len(texts), np.int64)  # those left out keep 1, which nothing reads
    by_length: dict[tuple[int, bool], list[IndexedHashes]] = {}
    for index, text in enumerate(texts):
        text_words = words(_prepared(text, masked))
        count = len(text_words)
        short = count < config.min_words
        if not text_words or (short and masked):  # a handful of words with any numbers identifies no problem
            continue
        n = count
        if not short:
            affordable = max(_SHORTEST, count // _EDIT)
            n = min(config.n, count, affordable)
        ngrams = ngram_hashes(word_hashes(text_words), n)
        hashes = np.unique(ngrams)
        sizes[index] = len(hashes)
        same_length = by_length.setdefault((n, short), [])
        same_length.append((index, hashes))
    tables = []
    for (n, short), problems in sorted(by_length.items()):
        tables.append(_table(n, short, problems))
    threshold = config.masked_threshold if masked else config.threshold
    return NgramIndex(sizes, tuple(tables), threshold)


def _table(n: int, short: bool, problems: list[IndexedHashes]) -> NgramTable:
    hash_parts = []
    owner_parts = []
    for index, hashes in problems:
        hash_parts.append(hashes)
        owner = np.full(len(hashes), index, np.int32)
        owner_parts.append(owner)
    all_hashes = np.concatenate(hash_parts)
    owners = np.concatenate(owner_parts)
    # Stable: the problems of an n-gram stay in the order of their indices.
    order = np.argsort(all_hashes, kind="stable")
    sorted_hashes = all_hashes[order]
    distinct, starts = np.unique(sorted_hashes, return_index=True)
    bounds = np.append(starts, len(all_hashes))
    return NgramTable(n, short, distinct, bounds, owners[order])


def _prepared(text: str, masked: bool) -> str:
    normalised = normalise(text)
    if masked:
        return mask_numbers(normalised)
    return normalised


@dataclass(frozen=True)
class Problems:
    """All evaluation problems.

    Attributes:
        names: Names for the report.
        images: Digests of the pixels of each problem's images; empty for a text problem.
        plain: Index of the questions.
        masked: Index of the questions with masked numbers.
        config: Settings of the comparison, and the folder of the rows' images.
    """

    names: list[str]
    images: list[frozenset[str]]
    plain: NgramIndex
    masked: NgramIndex | None
    config: PrepareConfig

    def contamination(self, row: RowJson) -> tuple[str, str, float] | None:
        """Return reason, name of the problem and share of its n-grams, or None for a clean row."""
        text = question(row)
        if self.config.decontaminate.fields == "row":
            response = response_text(row) or ""
            text += f"\n{response}"
        row_images: frozenset[str] | None = None  # decoded only for a row whose text matches
        # The plain index first: it is the stronger reason.
        indexes = ((PLAIN_MATCH, self.plain), (MASKED_MATCH, self.masked))
        for reason, index in indexes:
            if index is None:
                continue
            prepared_text = _prepared(text, index is self.masked)
            hashes = word_hashes(words(prepared_text))
            for share, problem in index.find(hashes):
                images = self.images[problem]
                if images:
                    if row_images is None:
                        row_images = self._pixels(row)
                    if not row_images & images:
                        continue
                return reason, self.names[problem], round(share, 3)
        return None

    def _pixels(self, row: RowJson) -> frozenset[str]:
        root = Path(self.config.dir)
        where = str(row.get("id"))
        digests = set()
        for name in image_names(row):
            part = ImagePart(path=root / name, root=root, where=where)
            image = load_image(part, self.config.data)
            digests.add(pixel_digest(image))
        return frozenset(digests)


def question(row: RowJson) -> str:
    """Return the text of the user's messages, without the request for a box that readers of foreign formats add."""
    texts = []
    for message in row["messages"]:
        if message["role"] == "user":
            texts.append(content_text(message["content"]))
    text = "\n".join(texts)
    text = text.replace(BOX_REQUEST, "")
    return text.replace(LETTER_REQUEST, "")


def pixel_digest(image: Image.Image) -> str:
    """Return the SHA-256 of size and pixels of an RGB image."""
    # The size belongs to it: the same bytes in rows of another width are another image.
    size = f"{image.width}x{image.height}\0"
    digest = hashlib.sha256(size.encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def load_problems(config: PrepareConfig) -> Problems:
    """Read every evaluation set.

    Raises:
        RowError: a set or a row of it cannot be read.
        ConfigError: a set is endless.
    """
    names = []
    texts = []
    images = []
    for name, text, pixels in _questions(config):
        names.append(name)
        texts.append(text)
        images.append(pixels)
    settings = config.decontaminate
    masked = None
    if settings.masked_threshold:
        masked = build_index(texts, settings, True)
    plain = build_index(texts, settings, False)
    return Problems(names, images, plain, masked, config)


def _questions(config: PrepareConfig) -> Iterator[tuple[str, str, frozenset[str]]]:
    """Yield name, question and digests of the images of every evaluation problem."""
    for source in config.decontaminate.sources:
        rows = open_source(source)
        if len(rows) >= ENDLESS:
            raise ConfigError(f"decontaminate.sources: {source.path} never ends; for a puzzle set split=heldout")
        for index in range(len(rows)):
            row = rows[index]
            images, videos = load_media(row, config.data)
            digests = {pixel_digest(image) for image in images}
            for frames in videos:
                digests.update(map(pixel_digest, frames))
            messages = []
            for message in row.messages:
                messages.append(MessageJson(role=message.role, content=message.text))
            name = f"{row.source}: {row.id}"
            text = question({"messages": messages})
            yield name, text, frozenset(digests)


def run(work: Work) -> None:
    """Drop every row that repeats a problem."""
    problems = load_problems(work.config)
    work.extra["problems"] = len(problems.names)
    matches: dict[str, int] = {}
    work.extra["problems_found"] = matches
    for mapped in work.map(partial(Problems.contamination, problems)):
        if mapped.result is None:
            work.keep(mapped.line, mapped.source)
            continue
        reason, problem, share = mapped.result
        matches[problem] = matches.get(problem, 0) + 1
        work.drop(
            mapped.line,
            mapped.source,
            reason,
            problem=problem,
            share=share,
        )


def inputs(config: PrepareConfig) -> list[object]:
    """Return fingerprints of the files of the evaluation sets."""
    fingerprints: list[object] = []
    for source in config.decontaminate.sources:
        fingerprints.append([source.path, listing(source.path)])
    return fingerprints


STAGE = PrepareStage(
    "decontaminate",
    run,
    lambda config: config.decontaminate,
    inputs,
)
