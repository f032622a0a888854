"""A stage of the preparation: its folder, its key, the rows that come in and go out, and the chain of stages.

A folder holds ``rows.jsonl`` (the kept rows), ``report.json``, ``figure.png`` and ``manifest.json``.  The manifest is
written last and holds the stage's key: a hash of its settings, of the files that it reads beside the rows, and of the
key of the previous stage.  A stage whose manifest has the right key is complete; any other runs again.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, is_dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import ovr_megatron
from ovr_megatron.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    Manifest,
    check,
    file_record,
    read_manifest,
    write_manifest,
)
from ovr_megatron.config import ConfigError
from ovr_megatron.curation.report import StageReport
from ovr_megatron.curation.settings import PrepareConfig
from ovr_megatron.data.row_json import RowJson
from ovr_megatron.data.sources import local_path
from ovr_megatron.data.tar_shards import expand_shards
from ovr_megatron.runtime.logs import get_logger
from ovr_megatron.runtime.progress import Progress

logger = get_logger(__name__)

ROWS = "rows.jsonl"
_REPORT = ("report.json", "figure.png")
_FILES = (f"{MANIFEST}.partial", "started", ROWS, *_REPORT)
_KEY = re.compile("[0-9a-f]{64}")
_CHUNK = 256  # rows that go to a worker at a time
_CHUNKS_PER_WORKER = 4  # submitted and not yet collected; bounds the rows in memory

RowFunction = Callable[[RowJson], Any]
ChunkResults = list[tuple[str, Any]]  # source and result of each row of a chunk
PendingChunk = tuple[tuple[str, ...], Future[ChunkResults]]  # lines, and the results to come
T = TypeVar("T")


@dataclass(frozen=True)
class MappedRow:
    """A row as a line of the file, its source, and the result of the function that `Work.map` applied to it."""

    line: str
    source: str
    result: Any


@dataclass(frozen=True)
class PrepareStage:
    """One stage of the preparation.

    Attributes:
        name: Name of its folder and of its settings in the configuration.
        run: Function that does the work; it must keep or drop every input row (but for `collect` and `teacher`).
        settings: Function that selects the part of the configuration on which the stage's result depends.
        inputs: Function that fingerprints, by `listing`, the files that the stage reads beside the rows.
        files: Glob patterns of what it writes into its folder beside the rows, the report and the journals.
    """

    name: str
    run: Callable[[Work], None]
    settings: Callable[[PrepareConfig], Any]
    inputs: Callable[[PrepareConfig], Any] = lambda config: None
    files: tuple[str, ...] = ()


class Work:
    """Input rows, output rows and report of a running stage.  A context manager.

    Attributes:
        config: The configuration of all stages.
        folder: The stage's own folder; a stage may leave files there from which an interrupted run goes on.
        input_folder: The folder with the input rows; None in the first stage.
        count: Number of input rows; 0 in the first stage.
        report: Counts, examples and values for the report.
        extra: Further entries of the manifest and the report, as JSON.
        empty_sources: Sources of which `collect` could use no row.
    """

    def __init__(
        self,
        name: str,
        config: PrepareConfig,
        input_folder: Path | None,
        count: int,
    ) -> None:
        """Open the files of the stage ``name``, which reads ``count`` rows of ``input_folder``."""
        self.config = config
        self.count = count
        self.input_folder = input_folder
        self.folder = Path(config.dir) / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.report = StageReport()
        self.extra: dict[str, object] = {}
        self.empty_sources: list[str] = []
        self._stack = ExitStack()
        file = (self.folder / ROWS).open("w", encoding="utf-8")
        self._out = self._stack.enter_context(file)
        progress = Progress(max(count, 1), name, "row", inner=True)
        self.progress = self._stack.enter_context(progress)

    def __enter__(self) -> Self:
        """Return the work itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the files."""
        self._stack.close()

    def lines(self) -> Iterator[str]:
        """Yield the input rows, one JSON text each."""
        if self.input_folder is None:
            return
        # newline="\n" turns off the translation of line ends: `keep` writes a line back byte for byte.
        with (self.input_folder / ROWS).open(encoding="utf-8", newline="\n") as file:
            yield from file

    def rows(self) -> Iterator[RowJson]:
        """Yield the input rows, decoded one at a time."""
        return map(json.loads, self.lines())

    def map(self, function: RowFunction) -> Iterator[MappedRow]:
        """Apply ``function``, which must be picklable, to every input row, in ``config.workers`` processes.

        Results come in the order of the rows; at most a few chunks are in memory.
        """
        chunks = batches(self.lines(), _CHUNK)
        workers = self.config.workers
        if workers == 1 or self.count <= _CHUNK:
            for chunk in chunks:
                results = map_chunk(function, chunk)
                yield from self._mapped_rows(chunk, results)
            return
        pending: deque[PendingChunk] = deque()
        # Spawned, not forked: this process has threads by now, and a forked child may inherit a lock that they hold.
        pool = ProcessPoolExecutor(workers, get_context("spawn"), _install, (function,))
        try:
            for chunk in chunks:
                future = pool.submit(_map_with_installed, chunk)
                pending.append((chunk, future))
                if len(pending) >= _CHUNKS_PER_WORKER * workers:
                    # Wait for the oldest chunk, not for any: results must come in the order of the rows.
                    oldest, future = pending.popleft()
                    yield from self._mapped_rows(oldest, future.result())
            for chunk, future in pending:
                yield from self._mapped_rows(chunk, future.result())
        finally:
            pool.shutdown(cancel_futures=True)

    def _mapped_rows(self, chunk: tuple[str, ...], results: ChunkResults) -> Iterator[MappedRow]:
        for line, (source, result) in zip(chunk, results, strict=True):
            yield MappedRow(line, source, result)
        self.progress.update(len(chunk))

    def keep(self, row: str | Mapping[str, object], source: str, **fields: object) -> None:
        """Write a row, given as an input line or as an object, with ``fields`` added to it."""
        if fields:
            decoded = json.loads(row) if isinstance(row, str) else row
            row = {**decoded, **fields}
        if isinstance(row, str):
            # A row without new fields is written as it was read, byte for byte.
            line = row
        else:
            line = json.dumps(row, ensure_ascii=False) + "\n"
        self._out.write(line)
        self.report.count_kept(source)

    def drop(self, row: str | Mapping[str, object], source: str, reason: str, **details: object) -> None:
        """Count a dropped row; the first few of each reason become examples, with ``details`` beside the row."""
        self.report.count_dropped(source, reason, row, details)


def batches(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """Cut ``items`` into tuples of ``size``; the last may be shorter."""
    iterator = iter(items)
    while batch := tuple(islice(iterator, size)):
        yield batch


def map_chunk(function: RowFunction, lines: tuple[str, ...]) -> ChunkResults:
    """Return the source of each row and the result of ``function`` on it; runs in a worker."""
    results = []
    for line in lines:
        row = json.loads(line)
        source = row.get("source", "")
        results.append((source, function(row)))
    return results


_installed: RowFunction


def _install(function: RowFunction) -> None:
    """Give a worker its function once, not with every chunk: an index of evaluation problems is large."""
    global _installed
    _installed = function


def _map_with_installed(lines: tuple[str, ...]) -> ChunkResults:
    return map_chunk(_installed, lines)


def run_stages(stages: list[PrepareStage], config: PrepareConfig) -> Path:
    """Run ``stages`` in order and skip complete ones; returns the folder of the last."""
    input_folder: Path | None = None
    key = ""
    count = 0
    for stage in stages:
        folder = Path(config.dir) / stage.name
        key = stage_key(stage, config, key)
        manifest = finished(folder, key)
        note = " (done before)"
        if manifest is None:
            note = ""
            clear(folder, key, stage.files)
            manifest = _run(stage, config, input_folder, count, key)
        logger.info(_sentence(stage.name, manifest) + note)
        input_folder = folder
        count = int(manifest.extra["kept"])
    assert input_folder is not None, "there is at least one stage"
    return input_folder


def _run(
    stage: PrepareStage,
    config: PrepareConfig,
    input_folder: Path | None,
    count: int,
    key: str,
) -> Manifest:
    with Work(stage.name, config, input_folder, count) as work:
        stage.run(work)
    report = work.report
    counted = report.kept + report.dropped
    if stage.name not in ("collect", "teacher"):
        assert counted == count, f"{stage.name}: {counted} of {count} rows kept or dropped"
    settings = as_json(stage.settings(config))
    # Before the refusals below, which refer the user to the report.
    report.write(work.folder, stage.name, {"settings": settings, **work.extra})
    if not report.kept:
        raise ConfigError(
            f"{work.folder}: {stage.name} kept none of {counted} rows; report.json says why; loosen its settings"
        )
    empty_sources = report.describe_empty_sources()
    if stage.name == "collect":
        # A row that cannot be read has no source yet: here the sources of the configuration count.
        empty_sources = work.empty_sources
    if empty_sources and not config.allow_empty:
        names = ", ".join(empty_sources)
        raise ConfigError(
            f"{work.folder}: {stage.name} kept no row of {names}; report.json says why; loosen its "
            "settings, leave the source out, or set allow_empty=true"
        )
    extra = {"key": key, "kept": report.kept, "dropped": report.dropped, **work.extra}
    records = {}
    for file in _files_of(work.folder, (ROWS, *_REPORT, *stage.files)):
        name = file.relative_to(work.folder).as_posix()
        records[name] = file_record(file)
    # The manifest comes last: a stage that was interrupted before this line has none and runs again.
    return write_manifest(work.folder, 0, extra, records)


def _files_of(folder: Path, patterns: Iterable[str]) -> Iterator[Path]:
    """Yield the files that match ``patterns``, and those below the folders that do."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            if path.is_file():
                yield path
                continue
            for file in path.rglob("*"):
                if file.is_file():
                    yield file


def stage_key(stage: PrepareStage, config: PrepareConfig, previous_key: str) -> str:
    """Return the SHA-256 of everything on which the result of ``stage`` depends."""
    settings = as_json(stage.settings(config))
    inputs = as_json(stage.inputs(config))
    # The previous key stands for everything before: a change in an early stage changes all later keys.
    parts = [ovr_megatron.__version__, stage.name, config.seed, settings, inputs, previous_key]
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def finished(folder: Path, key: str) -> Manifest | None:
    """Return the manifest of a stage that is complete (by the sizes of its files) and has this key, else None."""
    try:
        # Without digests: reading all files again would take longer than some stages.
        manifest = check(folder, digests=False)
    except CheckpointError:
        return None
    if manifest.extra.get("key") != key:
        return None
    return manifest


def check_stage_folder(folder: Path) -> None:
    """Refuse a folder that no stage of a preparation has written, unless it is empty or missing.

    Raises:
        ConfigError: names the folder.
    """
    if not folder.exists():
        return
    if folder.is_dir() and not any(folder.iterdir()):
        return
    started = folder / "started"
    if started.is_file():
        # Any file may have this name: its text need not be UTF-8.
        text = started.read_text(encoding="utf-8", errors="replace")
        if _KEY.fullmatch(text):
            return
    try:
        has_key = "key" in read_manifest(folder).extra
    except CheckpointError:
        has_key = False
    if not has_key:
        raise ConfigError(f"{folder} was not written by a preparation, so nothing is written into it; give another dir")


def clear(folder: Path, key: str, files: Sequence[str]) -> None:
    """Make ready for a run: scores of an interrupted run with the same key stay, and so do journals.

    Only the files that stages write are removed (`_FILES` and the patterns ``files``); others stay.
    """
    # The manifest goes first: without it the folder does not count as complete while files are being removed.
    (folder / MANIFEST).unlink(missing_ok=True)
    started = folder / "started"
    is_same_run = started.is_file() and started.read_text() == key
    if not is_same_run:
        for pattern in (*_FILES, *files):
            for path in folder.glob(pattern):
                # `rmtree` refuses a link to a folder, whose files are not ours anyway.
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    started.write_text(key)


def listing(path: str) -> Any:
    """Return a fingerprint of a path: name, size and mtime of each file below it.

    A path that is not on this disk (a puzzle, a Hugging Face name) is returned as it is.
    """
    root, _ = local_path(path)
    shards = expand_shards(path)
    if root is None and len(shards) > 1:
        return [listing(shard) for shard in shards]
    if root is None:
        return path
    files = [root]
    if not root.is_file():
        # Sorted: a file system lists a folder in any order, and the key must not depend on it.
        files = sorted(item for item in root.rglob("*") if item.is_file())
    fingerprints = []
    for file in files:
        stat = file.stat()
        fingerprints.append([str(file), stat.st_size, stat.st_mtime_ns])
    return fingerprints


def as_json(value: Any) -> Any:
    """Convert dataclasses to JSON objects, at any depth of lists and mappings."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {name: as_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return value


def _sentence(name: str, manifest: Manifest) -> str:
    kept_rows = manifest.extra["kept"]
    dropped_rows = manifest.extra["dropped"]
    return f"{name}: {kept_rows:,} rows kept, {dropped_rows:,} dropped"
