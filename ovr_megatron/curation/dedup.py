"""Exact and near duplicates: of each group the first row stays.

Rows are exact duplicates if roles, texts (runs of white space count as one) and images are the same.  Near duplicates
agree in most of their word n-grams (`ovr_megatron.curation.minhash`), have the same images, and the same numbers in the
prompt unless ``dedup.same_numbers`` is false.
"""

from __future__ import annotations

import hashlib
import sys
from functools import partial
from typing import Any

import numpy as np

from ovr_megatron.curation.minhash import near_duplicates, shingles_of, signature
from ovr_megatron.curation.settings import DedupConfig
from ovr_megatron.curation.stage import PrepareStage, Work
from ovr_megatron.curation.text import (
    content_text,
    hash_of,
    image_names,
    normalise,
    numbers,
    prompt_text,
    response_text,
    word_hashes,
    words,
)

EXACT, NEAR = "exact duplicate", "near duplicate"
SIGNATURES = "signatures.bin"


def run(work: Work) -> None:
    """Hash every row, find the duplicates among the hashes, and write the others."""
    config = work.config.dedup
    exact, classes = np.zeros(work.count, np.uint64), np.zeros(work.count, np.uint64)
    width = config.permutations if config.near else 0
    file = work.folder / SIGNATURES
    shape = (work.count, max(width, 1))
    signatures: np.ndarray = np.memmap(file, np.uint32, "w+", shape=shape)
    sources: list[str] = []  # one text object for each source, not for each row
    for index, mapped in enumerate(work.map(partial(hashes, config))):
        sources.append(sys.intern(mapped.source))
        exact[index], classes[index], found = mapped.result
        if config.near:
            signatures[index] = found
    first = first_equal(exact)
    of = first.copy()
    if config.near:
        unique = np.flatnonzero(first < 0)
        leaders = near_duplicates(
            signatures if len(unique) == work.count else signatures[unique],
            classes[unique],
            config.bands,
            config.threshold,
        )
        near = leaders >= 0
        of[unique[near]] = unique[leaders[near]]
    for index, (line, source) in enumerate(zip(work.lines(), sources, strict=True)):
        if of[index] < 0:
            work.keep(line, source)
        else:
            work.drop(line, source, EXACT if first[index] >= 0 else NEAR, number=index, of=int(of[index]))
    del signatures
    file.unlink()


def hashes(config: DedupConfig, row: dict[str, Any]) -> tuple[int, int, np.ndarray | None]:
    """Of one row: the hash of all that makes it, the class in which it is compared, and its signature."""
    messages = row["messages"]
    if config.key == "prompt" and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    images = " ".join(image_names(row))
    told = "\0".join(f"{m['role']}\0{' '.join(content_text(m['content']).split())}" for m in messages)
    digest = hashlib.blake2b(f"{images}\0{told}".encode(), digest_size=8).digest()
    exact = int.from_bytes(digest, "big")
    if not config.near:
        return exact, 0, None
    prompt = normalise(prompt_text(row))
    text = prompt if config.key == "prompt" else prompt + "\n" + normalise(response_text(row) or "")
    kind = [images, *(numbers(prompt) if config.same_numbers else [])]
    shingles = shingles_of(word_hashes(words(text)), config.shingle)
    return exact, hash_of(kind), signature(shingles, config.permutations)


def first_equal(values: np.ndarray) -> np.ndarray:
    """int64[n]: for each of ``values`` [n] the first place with the same value, -1 if that is its own."""
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    starts = np.concatenate([[True], ranked[1:] != ranked[:-1]]) if len(values) else np.zeros(0, bool)
    first = order[starts][np.cumsum(starts) - 1]
    result = np.full(len(values), -1, np.int64)
    result[order] = np.where(order == first, -1, first)
    return result


STAGE = PrepareStage("dedup", run, lambda config: config.dedup, files=(SIGNATURES,))
