"""Exact and near duplicates: the first row of each group stays.

Rows are exact duplicates if roles, texts (runs of white space count as one) and images are the same.  Near duplicates
agree in most of their word n-grams (`ovr_megatron.curation.minhash`), have the same images, and the same numbers in the
prompt unless ``dedup.same_numbers`` is false.
"""

from __future__ import annotations

import hashlib
import sys
from functools import partial

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
from ovr_megatron.data.row_json import RowJson

EXACT = "exact duplicate"
NEAR = "near duplicate"
SIGNATURES = "signatures.bin"


def run(work: Work) -> None:
    """Hash every row, find the duplicates among the hashes, and write the others."""
    config = work.config.dedup
    exact = np.zeros(work.count, np.uint64)
    classes = np.zeros(work.count, np.uint64)
    # On disk: the signatures of millions of rows need not fit into memory.
    file = work.folder / SIGNATURES
    width = config.permutations if config.near else 1
    shape = (work.count, max(width, 1))
    signatures: np.ndarray = np.memmap(file, np.uint32, "w+", shape=shape)
    sources: list[str] = []
    row_hashes = work.map(partial(hashes, config))
    for index, mapped in enumerate(row_hashes):
        sources.append(sys.intern(mapped.source))  # one string object for each source, not for each row
        content_hash, comparison_class, row_signature = mapped.result
        exact[index] = content_hash
        classes[index] = comparison_class
        if config.near:
            signatures[index] = row_signature
    first = first_equal(exact)
    originals = first.copy()  # int64[n]: the row that each row duplicates, -1 for a row that stays
    if config.near:
        unique = np.flatnonzero(first < 0)
        # Indexing copies the selected signatures into memory; without exact duplicates the mapped file will do.
        unique_signatures = signatures
        if len(unique) < work.count:
            unique_signatures = signatures[unique]
        leaders = near_duplicates(
            unique_signatures,
            classes[unique],
            config.bands,
            config.threshold,
        )
        # Indices into the unique rows become indices of rows.
        is_near = leaders >= 0
        near_rows = unique[is_near]
        near_leaders = leaders[is_near]
        originals[near_rows] = unique[near_leaders]
    for index, (line, source) in enumerate(zip(work.lines(), sources, strict=True)):
        original = int(originals[index])
        if original < 0:
            work.keep(line, source)
        else:
            reason = EXACT if first[index] >= 0 else NEAR
            work.drop(line, source, reason, number=index, of=original)
    del signatures  # unmaps the file
    file.unlink()


def hashes(config: DedupConfig, row: RowJson) -> tuple[int, int, np.ndarray | None]:
    """Return the hash of a row's content, the class within which it is compared, and its signature."""
    messages = row["messages"]
    if config.key == "prompt" and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    images = " ".join(image_names(row))
    texts = []
    for message in messages:
        text_words = content_text(message["content"]).split()
        text = " ".join(text_words)
        texts.append(f"{message['role']}\0{text}")
    # NUL between the fields: words must not move from one to the next unnoticed.
    content = f"{images}\0" + "\0".join(texts)
    digest = hashlib.blake2b(content.encode(), digest_size=8).digest()
    exact = int.from_bytes(digest, "big")
    if not config.near:
        return exact, 0, None
    prompt = normalise(prompt_text(row))
    text = prompt
    if config.key != "prompt":
        response = normalise(response_text(row) or "")
        text = f"{prompt}\n{response}"
    comparison_class = [images]
    if config.same_numbers:
        comparison_class += numbers(prompt)
    text_words = words(text)
    shingles = shingles_of(word_hashes(text_words), config.shingle)
    row_signature = signature(shingles, config.permutations)
    return exact, hash_of(comparison_class), row_signature


def first_equal(values: np.ndarray) -> np.ndarray:
    """Return int64[n]: for each of ``values`` [n] the first index with the same value, -1 where that is its own."""
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    is_start = np.ones(len(values), bool)
    is_start[1:] = ranked[1:] != ranked[:-1]
    # The sort is stable: the row at the start of a run of equal values is the first of them.
    first_of_runs = order[is_start]
    runs = np.cumsum(is_start) - 1
    first = first_of_runs[runs]
    is_first = order == first
    result = np.full(len(values), -1, np.int64)
    result[order] = np.where(is_first, -1, first)
    return result


STAGE = PrepareStage("dedup", run, lambda config: config.dedup, files=(SIGNATURES,))
