"""Evaluation problems out of the training set, by word n-grams: verbatim, re-cased, edited, or inside a longer prompt.

The share of a problem's different n-grams that a row has does not depend on what else the row says, so a problem is
found in a longer prompt as well; an edited word costs n of them.  A problem with images is found only in a row that has
one of its images, pixel for pixel: many share their question.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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
from ovr_megatron.data.schema import BOX_REQUEST, ENDLESS, LETTER_REQUEST, ImagePart
from ovr_megatron.data.sources import open_source

KEPT, MASKED = "evaluation problem", "evaluation problem with other numbers"


_EDIT = 4  # an edited word must not cost more than about a quarter of a short problem's n-grams
_SHORTEST = 4


@dataclass(frozen=True)
class Grams:
    """The n-grams of all problems that are cut into n-grams of one length.

    Attributes:
        n: Words of an n-gram.
        whole: Whether these are very short problems as a whole, which must make half of a prompt.
        hashes: uint64[g], ascending and different.
        starts: int64[g + 1]; problems with n-gram i are ``problems[starts[i] : starts[i + 1]]``.
        problems: int32, numbers of problems.
    """

    n: int
    whole: bool
    hashes: np.ndarray
    starts: np.ndarray
    problems: np.ndarray


@dataclass(frozen=True)
class Index:
    """Evaluation problems ready to be looked for.

    Attributes:
        sizes: int64[p], different n-grams of each problem.
        grams: By length of n-gram.
        threshold: Share of a problem's n-grams that finds it.
    """

    sizes: np.ndarray
    grams: tuple[Grams, ...]
    threshold: float

    def find(self, hashes: np.ndarray) -> list[tuple[float, int]]:
        """Problems of which a text of word ``hashes`` has the threshold's share: (share, number), the largest first."""
        best: list[tuple[float, int]] = []
        for grams in self.grams:
            if grams.whole and 2 * grams.n < len(hashes):
                continue
            found = np.unique(ngram_hashes(hashes, grams.n))
            places = np.searchsorted(grams.hashes, found)
            places = places[grams.hashes[np.minimum(places, len(grams.hashes) - 1)] == found]
            if not len(places):
                continue
            hit = np.concatenate([grams.problems[grams.starts[i] : grams.starts[i + 1]] for i in places])
            problems, counts = np.unique(hit, return_counts=True)
            shares = counts / self.sizes[problems]
            best += [(float(shares[i]), int(problems[i])) for i in np.flatnonzero(shares >= self.threshold)]
        return sorted(best, reverse=True)


def build_index(texts: list[str], config: DecontaminateConfig, masked: bool) -> Index:
    """Index problems by their questions; with ``masked`` all numbers are the same."""
    sizes = np.ones(len(texts), np.int64)
    by_length: dict[tuple[int, bool], list[tuple[int, np.ndarray]]] = {}
    for number, text in enumerate(texts):
        told = words(_prepared(text, masked))
        whole = len(told) < config.min_words
        if not told or (whole and masked):  # a handful of words with any numbers says nothing
            continue
        n = len(told) if whole else min(config.n, len(told), max(_SHORTEST, len(told) // _EDIT))
        found = np.unique(ngram_hashes(word_hashes(told), n))
        sizes[number] = len(found)
        by_length.setdefault((n, whole), []).append((number, found))
    threshold = config.masked_threshold if masked else config.threshold
    return Index(sizes, tuple(_grams(*kind, items) for kind, items in sorted(by_length.items())), threshold)


def _grams(n: int, whole: bool, items: list[tuple[int, np.ndarray]]) -> Grams:
    flat = np.concatenate([found for _, found in items])
    owner = np.concatenate([np.full(len(found), number, np.int32) for number, found in items])
    order = np.argsort(flat, kind="stable")
    hashes, starts = np.unique(flat[order], return_index=True)
    return Grams(n, whole, hashes, np.append(starts, len(flat)), owner[order])


def _prepared(text: str, masked: bool) -> str:
    return mask_numbers(normalise(text)) if masked else normalise(text)


@dataclass(frozen=True)
class Problems:
    """All evaluation problems.

    Attributes:
        names: For the report.
        images: Digests of the pixels of each problem's images; empty for a text problem.
        plain: Index of the questions.
        masked: Index of the questions with masked numbers.
        config: What is compared, and where the rows' images are.
    """

    names: list[str]
    images: list[frozenset[str]]
    plain: Index
    masked: Index | None
    config: PrepareConfig

    def contamination(self, row: dict[str, Any]) -> tuple[str, str, float] | None:
        """Reason, name of the problem and share of its n-grams, or None for a clean row."""
        text = question(row)
        if self.config.decontaminate.fields == "row":
            text += f"\n{response_text(row) or ''}"
        own: frozenset[str] | None = None
        for reason, index in ((KEPT, self.plain), (MASKED, self.masked)):
            if index is None:
                continue
            told = words(_prepared(text, index is self.masked))
            for share, number in index.find(word_hashes(told)):
                if self.images[number]:
                    own = self._pixels(row) if own is None else own
                    if not own & self.images[number]:
                        continue
                return reason, self.names[number], round(share, 3)
        return None

    def _pixels(self, row: dict[str, Any]) -> frozenset[str]:
        root = Path(self.config.dir)
        parts = [ImagePart(path=root / name, root=root, where=str(row.get("id"))) for name in image_names(row)]
        return frozenset(pixel_digest(load_image(part, self.config.data)) for part in parts)


def question(row: dict[str, Any]) -> str:
    """What the user says, without the request for a box that readers of foreign formats add."""
    text = "\n".join(content_text(m["content"]) for m in row["messages"] if m["role"] == "user")
    return text.replace(BOX_REQUEST, "").replace(LETTER_REQUEST, "")


def pixel_digest(image: Image.Image) -> str:
    """SHA-256 of size and pixels of an RGB image."""
    return hashlib.sha256(f"{image.width}x{image.height}\0".encode() + image.tobytes()).hexdigest()


def load_problems(config: PrepareConfig) -> Problems:
    """Read every evaluation set.

    Raises:
        RowError: a set or a row of it cannot be read.
        ConfigError: a set is endless.
    """
    names, texts, images = [], [], []
    for name, text, pixels in _questions(config):
        names.append(name)
        texts.append(text)
        images.append(pixels)
    settings = config.decontaminate
    masked = build_index(texts, settings, True) if settings.masked_threshold else None
    return Problems(names, images, build_index(texts, settings, False), masked, config)


def _questions(config: PrepareConfig) -> Iterator[tuple[str, str, frozenset[str]]]:
    for source in config.decontaminate.sources:
        opened = open_source(source)
        if len(opened) >= ENDLESS:
            raise ConfigError(f"decontaminate.sources: {source.path} never ends; for a puzzle set split=heldout")
        for index in range(len(opened)):
            row = opened[index]
            pictures, videos = load_media(row, config.data)
            pixels = frozenset(map(pixel_digest, [*pictures, *(frame for video in videos for frame in video)]))
            told = {"messages": [{"role": m.role, "content": m.text} for m in row.messages]}
            yield f"{row.source}: {row.id}", question(told), pixels


def run(work: Work) -> None:
    """Drop every row that repeats a problem."""
    problems = load_problems(work.config)
    work.extra["problems"] = len(problems.names)
    found: dict[str, int] = {}
    work.extra["problems_found"] = found
    for mapped in work.map(partial(Problems.contamination, problems)):
        if mapped.result is None:
            work.keep(mapped.line, mapped.source)
            continue
        reason, problem, share = mapped.result
        found[problem] = found.get(problem, 0) + 1
        work.drop(mapped.line, mapped.source, reason, problem=problem, share=share)


def inputs(config: PrepareConfig) -> list[Any]:
    """The files of the evaluation sets."""
    return [[source.path, listing(source.path)] for source in config.decontaminate.sources]


STAGE = PrepareStage("decontaminate", run, lambda config: config.decontaminate, inputs)
