"""Write rows to a tokenised set with worker processes; the set is the same for any number of workers."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ovr_megatron.config import ConfigError, DataConfig
from ovr_megatron.data.fingerprints import fingerprint, read_fingerprints
from ovr_megatron.data.packing import count_replies
from ovr_megatron.data.processing import Processor, TooLongError
from ovr_megatron.data.samples import Sample
from ovr_megatron.data.schema import ENDLESS, Row, RowError, RowSource
from ovr_megatron.data.sources import open_source
from ovr_megatron.data.tokenised import CONTEXT, TokenisedManifest, read_tokenised_manifest
from ovr_megatron.data.tokenised_writer import Texts, TokenisedWriter
from ovr_megatron.runtime.progress import Progress

CHUNK_ROWS = 256  # rows that one process takes at a time
_PENDING = 4  # chunks for each process that are under way or done and not yet written


@dataclass(frozen=True)
class Chunk:
    """Rows ``start`` to ``stop`` (exclusive) of the source with index ``source``."""

    source: int
    start: int
    stop: int


@dataclass
class Tokenised:
    """A chunk's samples, the rows that were left out with their errors, and the number of excluded rows."""

    chunk: Chunk
    texts: Texts
    skipped: list[RowError] = field(default_factory=list)
    excluded: int = 0


class Tokeniser:
    """Turns chunks of rows into tokens.  It opens the sources and the processor for itself."""

    def __init__(self, model: str | Path, config: DataConfig) -> None:
        """Open everything.

        Raises:
            RowError: a source cannot be read or is empty.
            ConfigError: a source is endless.
        """
        self.config = config
        self.processor = Processor(model, config)
        self.sources: list[RowSource] = [open_source(source) for source in config.sources]
        for source, opened in zip(config.sources, self.sources, strict=True):
            if len(opened) >= ENDLESS:
                raise ConfigError(f"{source.path} is endless; a tokenised set needs sources that end")
        self._exclude: frozenset[str] = frozenset()
        if config.exclude:
            self._exclude = read_fingerprints(Path(config.exclude))

    def chunks(self) -> list[Chunk]:
        """Cut all rows of all sources into chunks, in order."""
        chunks = []
        for index, source in enumerate(self.sources):
            for start in range(0, len(source), CHUNK_ROWS):
                stop = min(start + CHUNK_ROWS, len(source))
                chunks.append(Chunk(index, start, stop))
        return chunks

    def __call__(self, chunk: Chunk) -> Tokenised:
        """Tokenise ``chunk``.

        Raises:
            RowError: a row cannot be used or is too long, and ``data.on_error`` is ``stop``.
        """
        source = self.sources[chunk.source]
        result = Tokenised(chunk, _join_samples([], []))
        rows: list[tuple[int, Row]] = []
        for index in range(chunk.start, chunk.stop):
            try:
                row = source[index]
                _refuse_media(row)
                if self._is_excluded(row):
                    result.excluded += 1
                else:
                    rows.append((index, row))
            except RowError as error:
                self._leave_out(error, result)
        encoded = self._encode(rows, result)
        samples_by_row = dict(encoded)
        encoded_rows = [row for index, row in rows if index in samples_by_row]
        replies = count_replies(encoded_rows, self.config.learn)
        samples = list(samples_by_row.values())
        indices = list(samples_by_row)
        result.texts = _join_samples(samples, indices, replies)
        return result

    def _is_excluded(self, row: Row) -> bool:
        # Without a list no fingerprint is computed.
        if not self._exclude:
            return False
        return fingerprint(row, self.config) in self._exclude

    def _encode(self, rows: Sequence[tuple[int, Row]], result: Tokenised) -> list[tuple[int, Sample]]:
        """Encode ``rows`` in one call, or row by row where that fails and rows may be skipped."""
        if not rows:
            return []
        encoded: list[tuple[int, Sample]] = []
        try:
            samples = self.processor.encode([row for _, row in rows], generation=False)
            for (index, row), sample in zip(rows, samples, strict=True):
                self._check_length(row, sample)
                encoded.append((index, sample))
        except RowError as error:
            encoded.clear()
            if len(rows) == 1 or self.config.on_error == "stop":
                self._leave_out(error, result)
                return encoded
            for indexed_row in rows:
                encoded += self._encode([indexed_row], result)
        return encoded

    def _check_length(self, row: Row, sample: Sample) -> None:
        limit = self.config.pack_tokens
        if len(sample) > limit:
            problem = f"the row takes {len(sample)} tokens, more than data.pack_tokens={limit}"
            remedy = "shorten the row, raise the limit, or leave out what is too long with data.on_error=skip"
            raise TooLongError(row.where, "messages", problem, remedy)

    def _leave_out(self, error: RowError, result: Tokenised) -> None:
        """List the row of ``error`` as skipped, or raise the error where ``data.on_error`` is ``stop``."""
        if self.config.on_error == "stop":
            raise error
        result.skipped.append(error)


def tokenise(
    config: DataConfig,
    model: str | Path,
    folder: str | Path,
    workers: int = 1,
) -> TokenisedManifest:
    """Write the rows of ``config.sources`` to a new tokenised set at ``folder``.

    Args:
        config: Sources, limits, template and ``on_error``; a source's weight is how often an epoch has its rows.
        model: Hugging Face folder whose tokenizer and template make the tokens.
        folder: The set; it appears when it is complete.
        workers: Processes that tokenise.

    Raises:
        RowError: a source or a row cannot be used; with ``data.on_error=skip`` only a source.
        ConfigError: no source, an endless one, or ``folder`` exists.
    """
    if not config.sources:
        raise ConfigError("data.sources is empty: give at least one, for example 'data.sources=[{path: rows.jsonl}]'")
    tokeniser = Tokeniser(model, config)
    chunks = tokeniser.chunks()
    with ExitStack() as stack:
        rows = sum(map(len, tokeniser.sources))
        progress = stack.enter_context(Progress(rows, "tokenise", "row"))
        writer = stack.enter_context(TokenisedWriter(folder, tokeniser.processor))
        results: Iterator[Tokenised]
        if workers > 1:
            results = _tokenise_in_processes(chunks, model, config, workers, stack)
        else:
            results = map(tokeniser, chunks)
        # Samples name their source by its index, so every source is begun, in order.
        current = -1
        for result in results:
            while current < result.chunk.source:
                current += 1
                source = config.sources[current]
                name = source.name or Path(source.path).stem
                writer.begin_source(name, source.path, source.weight)
            writer.add(result.texts)
            writer.skip(result.skipped)
            writer.exclude(result.excluded)
            progress.update(result.chunk.stop - result.chunk.start)
    return read_tokenised_manifest(folder)


def _tokenise_in_processes(
    chunks: Sequence[Chunk],
    model: str | Path,
    config: DataConfig,
    workers: int,
    stack: ExitStack,
) -> Iterator[Tokenised]:
    """Yield the chunks' results in order; a bounded number of chunks is under way, so that memory is bounded, too."""
    context = multiprocessing.get_context("spawn")  # tokenizers has threads, which a fork would lose
    pool = stack.enter_context(ProcessPoolExecutor(workers, context, _start_worker, (model, config)))
    # After an error, the chunks in the queue are dropped.
    stack.callback(pool.shutdown, wait=False, cancel_futures=True)
    pending: deque[Future[Tokenised]] = deque()
    for chunk in chunks:
        pending.append(pool.submit(_tokenise_chunk, chunk))
        if len(pending) >= _PENDING * workers:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


# A worker process loads its tokeniser once; only chunks travel to it.
_worker: Callable[[Chunk], Tokenised]


def _start_worker(model: str | Path, config: DataConfig) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    _worker = Tokeniser(model, config)


def _tokenise_chunk(chunk: Chunk) -> Tokenised:
    return _worker(chunk)


def _refuse_media(row: Row) -> None:
    """Raise `RowError` if ``row`` has an image or a video."""
    for i, message in enumerate(row.messages):
        if not message.is_text:
            remedy = "a tokenised set holds texts only; train on rows with images through data.sources"
            raise RowError(row.where, f"messages[{i}].content", "has an image or a video", remedy)


def _join_samples(
    samples: Sequence[Sample],
    rows: Sequence[int],
    replies: tuple[int, int] = (0, 0),
) -> Texts:
    """Join the tokens of ``samples``; those behind the prompt that are no target get the bit `CONTEXT`."""
    tokens: list[np.ndarray] = [np.zeros(0, np.int64)]  # `np.concatenate` takes no empty list
    lengths = []
    prompts = []
    for sample in samples:
        prompt = int(np.argmax(sample.loss_mask))  # index of the first target
        # Tokens before it need no bit: the record's prompt length says that they are none.
        is_in_prompt = np.arange(len(sample)) < prompt
        is_plain = sample.loss_mask | is_in_prompt
        marked_tokens = sample.tokens | int(CONTEXT)
        tokens.append(np.where(is_plain, sample.tokens, marked_tokens))
        lengths.append(len(sample))
        prompts.append(prompt)
    return Texts(
        tokens=np.concatenate(tokens),
        lengths=np.array(lengths, np.int64),
        prompts=np.array(prompts, np.int64),
        rows=np.array(rows, np.int64),
        replies=replies,
    )


def show(manifest: TokenisedManifest) -> str:
    """Return a table of the sources."""
    head = f"{'source':40}{'weight':>8}{'samples':>12}{'tokens':>16}{'replies':>12}{'learned':>12}"
    lines = [f"{head}{'skipped':>9}{'excluded':>9}"]
    for source in manifest.sources:
        counts = f"{source.samples:12,}{source.tokens:16,}{source.replies:12,}{source.learned:12,}"
        counts += f"{source.skipped:9,}{source.excluded:9,}"
        lines.append(f"{source.name[:39]:40}{source.weight:8g}{counts}")
    return "\n".join(lines)
