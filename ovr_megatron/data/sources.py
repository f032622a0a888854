"""Sources of rows: JSONL, JSON and parquet files, folders of them, Hugging Face data sets, generated puzzles.

JSONL, parquet and Hugging Face data go through ``datasets``: memory-mapped, a row is decoded when it is read.
JSONL is read as lines of text, so that rows may differ in form and an error can name its line.
"""

from __future__ import annotations

import bisect
import errno
import glob
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl

import datasets
import numpy as np
import pyarrow.compute as pc

from ovr_megatron.config import ConfigError, SourceConfig
from ovr_megatron.data.formats import Reader, detect, find_reader
from ovr_megatron.data.puzzles import open_puzzle
from ovr_megatron.data.schema import Row, RowError, RowSource

SUFFIXES = (".jsonl", ".parquet", ".json")
_SURROGATE = re.compile(r"[\ud800-\udfff]")  # JSON may escape half of a pair; no tokenizer takes it
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_DETECTION_ROWS = 100  # rows of a file among which the first of a known form is looked for
_SPLITS = {
    "test": ("test", "testmini", "testing", "heldout"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "train": ("train", "training"),
}
_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def open_source(config: SourceConfig) -> RowSource:
    """Open the source that ``config.path`` names.

    Raises:
        RowError: there is no such file or data set, it is empty or unreadable, or its form is unknown.
        ConfigError: a parameter of a puzzle is unknown or has a wrong value.
    """
    if config.path.startswith("puzzle:"):
        return open_puzzle(config.path, config.name)
    path, split = local_path(config.path)
    if path is None:
        tables = [_open_hub(config.path)]
    else:
        tables = open_path(path, split)
    if config.image_root:
        root = Path(config.image_root).expanduser()
    elif path is None:
        root = Path.cwd()
    else:
        root = path if path.is_dir() else path.parent
    return TableRows(tables, config.format, root, config.name)


def local_path(text: str) -> tuple[Path | None, str | None]:
    """Return the file or folder that the ``path`` of a source names, None if there is none, and its ``?split=``."""
    path = Path(text).expanduser()
    # First: a file may have a question mark in its name.
    if path.exists():
        return path, None
    name, _, query = text.partition("?split=")
    folder = Path(name).expanduser()
    if query and folder.is_dir():
        return folder, query
    return None, None


class Table(Protocol):
    """Decoded objects by index, and the names under which errors and statistics know them."""

    label: str

    def __len__(self) -> int:
        """Return the number of objects."""

    def where(self, index: int) -> str:
        """Return the place of object ``index``."""

    def raw(self, index: int) -> Any:
        """Return object ``index`` as decoded from the file."""


class TableRows:
    """The rows of one or more tables, one after the other; parsed when they are read."""

    def __init__(
        self,
        tables: Sequence[Table],
        format: str,
        image_root: Path,
        name: str | None,
    ) -> None:
        """Join ``tables``; ``format`` 'auto' looks for the first known form in each; ``name`` labels every row."""
        self._tables = tables
        self._ends = list(itertools.accumulate(map(len, tables)))
        self._root = image_root
        self._name = name
        self._readers: list[Reader] = []
        for table in tables:
            table_format = _detect(table) if format == "auto" else format
            self._readers.append(find_reader(table_format))

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._ends[-1]

    def __getitem__(self, index: int) -> Row:
        """Return row ``index``; raises `RowError` if it cannot be used, `IndexError` past the end."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        # To the right: an index that is the end of a table is the first of the next.
        table_index = bisect.bisect_right(self._ends, index)
        table = self._tables[table_index]
        start = self._ends[table_index - 1] if table_index else 0
        local_index = int(index) - start
        read = self._readers[table_index]
        row = read(table.raw(local_index), table.where(local_index), self._root)
        for i, message in enumerate(row.messages):
            if surrogate := _SURROGATE.search(message.text):
                problem = f"has half a character, {surrogate[0]!r}"
                remedy = "write the text anew as UTF-8, or remove the row"
                raise RowError(row.where, f"messages[{i}].content", problem, remedy)
        source = self._name or row.source or table.label
        return replace(row, source=source)


def _detect(table: Table) -> str:
    """Return the name of the format of the first row of a known form.

    Raises:
        RowError: of the first row, where none of the first `_DETECTION_ROWS` has a known form.
    """
    first_error: RowError | None = None
    for index in range(min(len(table), _DETECTION_ROWS)):
        try:
            return detect(table.raw(index), table.where(index))
        except RowError as error:  # raised again when the row is read, where it may be skipped
            first_error = first_error or error
    assert first_error is not None, "tables have at least one row"
    raise first_error


class LineTable:
    """A JSONL file, held as lines; lines of nothing but white space are skipped."""

    def __init__(self, path: Path) -> None:
        """Map the file at ``path``."""
        self._path = path
        self.label = _label(path)
        pattern = glob.escape(str(path))  # a path may have brackets
        # "utf-8-sig" drops a byte order mark.
        self._lines = _load(str(path), "text", data_files=[pattern], encoding="utf-8-sig")
        # By Arrow, on the mapped column: millions of lines do not become Python objects.
        texts = self._lines.data.column("text")
        stripped_texts = pc.utf8_trim_whitespace(texts)
        filled = pc.not_equal(stripped_texts, "").to_numpy()
        self._line_numbers = np.flatnonzero(filled)  # from 0, of lines that are not blank

    def __len__(self) -> int:
        """Return the number of lines that are not blank."""
        return len(self._line_numbers)

    def where(self, index: int) -> str:
        """Return ``file:line``."""
        return f"{self._path}:{self._line_numbers[index] + 1}"

    def raw(self, index: int) -> Any:
        """Decode line ``index``."""
        line_index = int(self._line_numbers[index])
        line = self._lines[line_index]["text"]
        try:
            return json.loads(line)
        except ValueError as error:
            raise RowError(
                self.where(index),
                "",
                f"is not JSON ({error}): {line[:60]!r}",
                "write one JSON object a line, or remove the line",
            ) from error


class ArrowTable:
    """A table of ``datasets``; images stay encoded."""

    def __init__(self, name: str, label: str, dataset: datasets.Dataset) -> None:
        """Wrap ``dataset``, which errors call ``name`` and statistics ``label``."""
        self._name = name
        self.label = label
        self._dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._dataset)

    def where(self, index: int) -> str:
        """Return ``name[row]``."""
        return f"{self._name}[{index}]"

    def raw(self, index: int) -> Any:
        """Return row ``index`` as Python objects."""
        table = self._dataset[index : index + 1]
        return table.to_pylist()[0]


class ListTable:
    """A JSON file with one array of objects."""

    def __init__(self, path: Path) -> None:
        """Read the file at ``path``."""
        self._path = path
        self.label = _label(path)
        try:
            self._rows = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            remedy = "give one array of objects; a file with one object a line must be named .jsonl"
            raise RowError(str(path), "", f"is not JSON ({error})", remedy) from error
        if not isinstance(self._rows, list):
            raise RowError(str(path), "", f"holds a {type(self._rows).__name__}", "give one array of objects")

    def __len__(self) -> int:
        """Return the number of objects."""
        return len(self._rows)

    def where(self, index: int) -> str:
        """Return ``file[index]``."""
        return f"{self._path}[{index}]"

    def raw(self, index: int) -> Any:
        """Return object ``index``."""
        return self._rows[index]


def open_path(path: Path, split: str | None) -> list[Table]:
    """Open the tables of a file, or of a folder; ``split`` selects files by the split that their name says.

    Raises:
        RowError: there are no rows, or files of several splits and ``split`` names none of them.
    """
    if path.is_file():
        return [_open_file(path)]
    if (path / "dataset_info.json").is_file():
        return [_open_saved(path)]
    if (path / "dataset_dict.json").is_file():
        folders = {item.name: [item] for item in path.iterdir() if item.is_dir()}
        return [_open_saved(folder) for folder in _select_split(path, folders, split)]
    files = _list_files(path)
    if not files:
        raise RowError(str(path), "", f"has no {', '.join(SUFFIXES)} file", "name a file, or a folder with such files")
    files_by_split: dict[str, list[Path]] = {}
    for file in files:
        files_by_split.setdefault(_split_of(file), []).append(file)
    return [_open_file(file) for file in _select_split(path, files_by_split, split)]


def _list_files(folder: Path) -> list[Path]:
    """Return the files of the first of `SUFFIXES` that a folder has, sorted."""
    files = sorted(folder.iterdir())
    # One form alone, so that rows that stand there in two forms are not read twice.
    for suffix in SUFFIXES:
        matches = [file for file in files if file.suffix == suffix]
        if matches:
            return matches
    return []


def _split_of(file: Path) -> str:
    """Return the split that a word of a file's name says; ``train`` where no word does."""
    words = re.split(r"[-_.\s]+", file.stem.lower())
    for word in words:
        for split, names in _SPLITS.items():
            if word in names:
                return split
    return "train"


def _select_split(path: Path, splits: Mapping[str, list[Path]], split: str | None) -> list[Path]:
    """Return the files of ``split``; where it is None, the files of the only split that there is."""
    names = ", ".join(sorted(splits))
    if split is not None and split in splits:
        return splits[split]
    if split is not None:
        raise RowError(str(path), "", f"has no file of the split {split!r}", f"choose one of {names}")
    if len(splits) > 1:
        example = "train" if "train" in splits else min(splits)
        remedy = f"name one file, or write {path}?split={example}"
        raise RowError(str(path), "", f"has files of several splits: {names}", remedy)
    return next(iter(splits.values()), [])


def _open_file(path: Path) -> Table:
    table: Table
    if path.suffix == ".jsonl":
        if path.stat().st_size == 0:
            raise RowError(str(path), "", "is empty", "give at least one row")
        table = LineTable(path)
    elif path.suffix == ".parquet":
        pattern = glob.escape(str(path))  # a path may have brackets
        dataset = _load(str(path), "parquet", data_files=[pattern])
        table = ArrowTable(str(path), _label(path), dataset)
    elif path.suffix == ".json":
        table = ListTable(path)
    else:
        raise RowError(str(path), "", "has an unknown suffix", f"use one of {', '.join(SUFFIXES)}")
    _refuse_empty(table, path)
    return table


def _open_saved(path: Path) -> Table:
    """Open a folder that ``datasets`` wrote with ``save_to_disk``."""
    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise RowError(str(path), "", f"cannot be loaded ({error})", "write the folder anew by save_to_disk") from error
    table = ArrowTable(str(path), _label(path), dataset)
    _refuse_empty(table, path)
    return table


def _refuse_empty(table: Table, path: Path) -> None:
    if len(table) == 0:
        raise RowError(str(path), "", "has no rows", "give at least one row")


def _open_hub(path: str) -> Table:
    """Open a Hugging Face data set, ``name?split=..&config=..``."""
    name, _, query = path.partition("?")
    if not _HUB_NAME.fullmatch(name) or Path(name).suffix in SUFFIXES:
        raise RowError(path, "", "there is no such file or folder", "correct data.sources[].path")
    options = dict(parse_qsl(query))
    unknown = sorted(set(options) - {"split", "config"})
    if unknown:
        raise ConfigError(f"{path}: {unknown[0]!r} is not known; a hub name takes ?split=..&config=..")
    split = options.get("split", "train")
    dataset = _load(path, name, name=options.get("config"), split=split)
    return ArrowTable(name, name, dataset)


def _load(where: str, builder: str, split: str = "train", **options: Any) -> datasets.Dataset:
    """Call ``datasets.load_dataset`` and turn its errors into a `RowError` at ``where``."""
    datasets.disable_progress_bars()  # every rank would show its own
    try:
        return datasets.load_dataset(builder, split=split, **options)
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error  # the library wraps the error of the file or the cache
        _check_cache(cause)
        remedy = "write the file anew"
        if isinstance(cause, UnicodeDecodeError):
            line_number = _undecodable_line(Path(where))
            where = f"{where}:{line_number}"
            remedy = "convert the file to UTF-8"
        raise RowError(where, "", f"cannot be read ({cause})", remedy) from error
    except (OSError, ValueError) as error:
        _check_cache(error)
        remedy = "correct the name, ?split=.. and ?config=.., or go online"
        if "data_files" in options:
            remedy = "write the file anew, or give it the suffix of its form"
        raise RowError(where, "", f"cannot be loaded ({error})", remedy) from error


def _check_cache(error: BaseException) -> None:
    """Raise `RowError` if ``error`` says that the cache of ``datasets`` is full or cannot be written."""
    cache = str(datasets.config.HF_DATASETS_CACHE)
    if not isinstance(error, OSError):
        return
    # `datasets` checks the free space before it writes, and then its error has no number.
    is_full = error.errno in _FULL_ERRORS or str(error).startswith("Not enough disk space")
    filename = str(error.filename or "")
    if not is_full and not filename.startswith(cache):
        return
    state = "full" if is_full else "not writable"
    problem = f"the cache of the library datasets is {state} ({error.strerror or error})"
    remedy = "free space there, or let the environment variable HF_DATASETS_CACHE name a folder that can be written"
    raise RowError(cache, "", problem, remedy) from error


def _undecodable_line(path: Path) -> int:
    """Return the number of the first line that is not UTF-8, from 1, or 0."""
    lines = path.read_bytes().split(b"\n")
    for line_number, line in enumerate(lines, start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            return line_number
    return 0


def _label(path: Path) -> str:
    """Return ``folder/stem`` of a file: the name of its rows in statistics."""
    folder = path.resolve().parent
    return f"{folder.name}/{path.stem}"
