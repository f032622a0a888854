"""A stage of the preparation: its folder, its key, the rows that come in and go out, and the chain of stages.

A folder holds ``rows.jsonl`` (the kept rows), ``report.json``, ``figure.png`` and ``manifest.json``, which is written
last and holds the stage's key: a hash of its settings, of the files that it reads beside the rows, and of the key
before it.  A stage whose manifest has the right key is done; any other is done anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
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
from ovr_megatron.curation.report import Tally
from ovr_megatron.curation.settings import PrepareConfig
from ovr_megatron.data.sources import local_path
from ovr_megatron.runtime.progress import Progress

ROWS = "rows.jsonl"
_REPORT = ("report.json", "figure.png")
_FILES = (f"{MANIFEST}.partial", "started", ROWS, *_REPORT)
_KEY = re.compile("[0-9a-f]{64}")
_CHUNK = 256  # rows that go to a worker at a time
_WAITING = 4  # chunks of each worker that may wait

Judge = Callable[[dict[str, Any]], Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Judged:
    """A row as it stands in the file, its source, and what a judge said of it."""

    line: str
    source: str
    result: Any


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: Of its folder and of its settings in the configuration.
        run: Does the work; every row that comes in must be kept or dropped (but for `collect` and `teacher`).
        settings: What of the configuration decides its outcome.
        inputs: Files that it reads beside the rows, as `listing` gives them.
        files: Patterns of what it writes into its folder beside the rows, the report and the journals.
    """

    name: str
    run: Callable[[Work], None]
    settings: Callable[[PrepareConfig], Any]
    inputs: Callable[[PrepareConfig], Any] = lambda config: None
    files: tuple[str, ...] = ()


class Work:
    """What a running stage has: rows in, rows out, and the counts of its report.  A context manager.

    Attributes:
        config: The whole configuration.
        folder: The stage's own folder; files kept there over an interruption are the stage's own business.
        before: The folder whose rows come in; None in the first stage.
        count: Number of rows that come in; 0 in the first stage.
        tally: Counts, examples and values for the report.
        extra: What later stages and the report want to know, as JSON; goes into the manifest and the report.
        emptied: Sources of which `collect` could use no row.
    """

    def __init__(self, name: str, config: PrepareConfig, before: Path | None, count: int) -> None:
        """Open the files of the stage ``name``, into which ``count`` rows of ``before`` come."""
        self.config, self.count, self.before = config, count, before
        self.folder = Path(config.dir) / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tally, self.extra, self.emptied = Tally(), dict[str, Any](), list[str]()
        self._stack = ExitStack()
        self._out = self._stack.enter_context((self.folder / ROWS).open("w", encoding="utf-8"))
        self.progress = self._stack.enter_context(Progress(max(count, 1), name, "row", inner=True))

    def __enter__(self) -> Self:
        """Return the work itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close the files."""
        self._stack.close()

    def lines(self) -> Iterator[str]:
        """The rows that come in, one JSON text each."""
        if self.before is None:
            return
        with (self.before / ROWS).open(encoding="utf-8", newline="\n") as file:
            yield from file

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows that come in, decoded one at a time."""
        return map(json.loads, self.lines())

    def judge(self, judge: Judge) -> Iterator[Judged]:
        """Apply ``judge``, which must be picklable, to every row that comes in, in ``config.workers`` processes.

        Results come in the order of the rows; at most a few chunks are held.
        """
        chunks = batches(self.lines(), _CHUNK)
        if self.config.workers == 1 or self.count <= _CHUNK:
            for chunk in chunks:
                yield from self._paired(chunk, judge_chunk(judge, chunk))
            return
        waiting: deque[tuple[tuple[str, ...], Future[list[tuple[str, Any]]]]] = deque()
        pool = ProcessPoolExecutor(self.config.workers, get_context("spawn"), _install, (judge,))
        try:
            for chunk in chunks:
                waiting.append((chunk, pool.submit(_judge_installed, chunk)))
                if len(waiting) >= _WAITING * self.config.workers:
                    first, future = waiting.popleft()
                    yield from self._paired(first, future.result())
            for chunk, future in waiting:
                yield from self._paired(chunk, future.result())
        finally:
            pool.shutdown(cancel_futures=True)

    def _paired(self, chunk: tuple[str, ...], results: list[tuple[str, Any]]) -> Iterator[Judged]:
        for line, (source, result) in zip(chunk, results, strict=True):
            yield Judged(line, source, result)
        self.progress.update(len(chunk))

    def keep(self, row: str | Mapping[str, Any], source: str, **added: Any) -> None:
        """Write a row, a line as it came in or an object, with the fields ``added``."""
        if added:
            row = {**(json.loads(row) if isinstance(row, str) else row), **added}
        line = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) + "\n"
        self._out.write(line)
        self.tally.keep(source)

    def drop(self, row: str | Mapping[str, Any], source: str, reason: str, **told: Any) -> None:
        """Count a row that goes, and keep it as an example if there are few of its reason; ``told`` explains."""
        self.tally.drop(source, reason, row, told)


def batches(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """Cut ``items`` into tuples of ``size``; the last may be shorter."""
    iterator = iter(items)
    while batch := tuple(islice(iterator, size)):
        yield batch


def judge_chunk(judge: Judge, lines: tuple[str, ...]) -> list[tuple[str, Any]]:
    """Source of each row and what ``judge`` says of it; runs in a worker."""
    rows = map(json.loads, lines)
    return [(row.get("source", ""), judge(row)) for row in rows]


_installed: Judge


def _install(judge: Judge) -> None:
    """Give a worker its judge once: an index of evaluation problems is large."""
    global _installed
    _installed = judge


def _judge_installed(lines: tuple[str, ...]) -> list[tuple[str, Any]]:
    return judge_chunk(_installed, lines)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process.

    Raises:
        ConfigError: another process holds it.
    """
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"dir={folder}: another preparation is at work there; wait, or give another dir"
            ) from None
        yield


def run_stages(stages: list[Stage], config: PrepareConfig, say: Callable[[str], None] = print) -> Path:
    """Run ``stages`` in order, leaving out what is done; returns the folder of the last one."""
    before: Path | None = None
    key, count = "", 0
    for stage in stages:
        folder = Path(config.dir) / stage.name
        key = stage_key(stage, config, key)
        manifest = finished(folder, key)
        if manifest is None:
            clear(folder, key, stage.files)
            manifest = _run(stage, config, before, count, key)
            say(_sentence(stage.name, manifest))
        else:
            say(_sentence(stage.name, manifest) + " (done before)")
        before, count = folder, int(manifest.extra["kept"])
    assert before is not None, "there is at least one stage"
    return before


def _run(stage: Stage, config: PrepareConfig, before: Path | None, count: int, key: str) -> Manifest:
    with Work(stage.name, config, before, count) as work:
        stage.run(work)
    counted = work.tally.kept + work.tally.dropped
    assert stage.name in ("collect", "teacher") or counted == count, f"{stage.name}: {counted} of {count} rows told"
    settings = as_json(stage.settings(config))
    work.tally.write(work.folder, stage.name, {"settings": settings, **work.extra})
    if not work.tally.kept:
        raise ConfigError(
            f"{work.folder}: {stage.name} kept none of {counted} rows; report.json says why; loosen its settings"
        )
    emptied = work.emptied if stage.name == "collect" else work.tally.emptied()
    if emptied and not config.allow_empty:
        raise ConfigError(
            f"{work.folder}: {stage.name} kept no row of {', '.join(emptied)}; report.json says why; loosen its "
            "settings, leave the source out, or set allow_empty=true"
        )
    told = {"key": key, "kept": work.tally.kept, "dropped": work.tally.dropped, **work.extra}
    own = (path for pattern in (ROWS, *_REPORT, *stage.files) for path in work.folder.glob(pattern))
    files = (file for path in own for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    records = {file.relative_to(work.folder).as_posix(): file_record(file) for file in files}
    return write_manifest(work.folder, 0, told, records)


def stage_key(stage: Stage, config: PrepareConfig, before: str) -> str:
    """SHA-256 of everything that decides the outcome of ``stage``."""
    inputs = as_json(stage.inputs(config))
    told = [ovr_megatron.__version__, stage.name, config.seed, as_json(stage.settings(config)), inputs, before]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def finished(folder: Path, key: str) -> Manifest | None:
    """The manifest of a stage that is whole (by the sizes of its files) and has this key, else None."""
    try:
        manifest = check(folder, digests=False)
    except CheckpointError:
        return None
    return manifest if manifest.extra.get("key") == key else None


def check_stage_folder(folder: Path) -> None:
    """Refuse a folder that no stage of a preparation has written, unless it is empty or not there.

    Raises:
        ConfigError: names the folder.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    started = folder / "started"
    if started.is_file() and _KEY.fullmatch(started.read_text(encoding="utf-8", errors="replace")):
        return
    try:
        ours = "key" in read_manifest(folder).extra
    except CheckpointError:
        ours = False
    if not ours:
        raise ConfigError(f"{folder} was not written by a preparation, so nothing is written into it; give another dir")


def clear(folder: Path, key: str, files: Sequence[str]) -> None:
    """Make ready for a run: scores of an interrupted run with the same key stay, and so do journals.

    Only what stages write is removed (`_FILES` and the patterns ``files``); what else lies there stays.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    started = folder / "started"
    if not (started.is_file() and started.read_text() == key):
        for path in (path for pattern in (*_FILES, *files) for path in folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    started.write_text(key)


def listing(path: str) -> Any:
    """What tells a changed file or folder: names, sizes and times of change; the name alone of what is no file."""
    root, _ = local_path(path)
    if root is None:
        return path
    files = [root] if root.is_file() else sorted(item for item in root.rglob("*") if item.is_file())
    stats = ((str(file), file.stat()) for file in files)
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def as_json(value: Any) -> Any:
    """Dataclasses as objects, at any depth of lists and mappings."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {name: as_json(item) for name, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, (list, tuple)) else value


def _sentence(name: str, manifest: Manifest) -> str:
    kept, dropped = manifest.extra["kept"], manifest.extra["dropped"]
    return f"{name}: {kept:,} rows kept, {dropped:,} dropped"
