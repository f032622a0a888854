"""Sources of rows: JSONL, JSON and parquet files, tar shards, folders of them, Hugging Face data sets, puzzles."""

from __future__ import annotations

import bisect
import glob
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import datasets

from ovr_megatron.config import ConfigError, SourceConfig
from ovr_megatron.data.formats import Reader, detect, find_reader
from ovr_megatron.data.puzzles import open_puzzle
from ovr_megatron.data.remote_files import is_url, local_copy
from ovr_megatron.data.schema import Row, RowError, RowSource
from ovr_megatron.data.tables import ArrowTable, LineTable, ListTable, Table, label_of, load_table
from ovr_megatron.data.tar_shards import TarTable, expand_shards

SUFFIXES = (".jsonl", ".parquet", ".json", ".tar")
_SURROGATE = re.compile(r"[\ud800-\udfff]")  # JSON may escape half of a pair; no tokenizer takes it
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_DETECTION_ROWS = 100  # rows of a file among which the first of a known form is looked for
_SPLITS = {
    "test": ("test", "testmini", "testing", "heldout"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "train": ("train", "training"),
}


def open_source(config: SourceConfig) -> RowSource:
    """Open the source that ``config.path`` names.

    Raises:
        RowError: there is no such file or data set, it is empty or unreadable, or its form is unknown.
        ConfigError: the source is streamed, or a parameter of a puzzle is unknown or has a wrong value.
    """
    if config.streaming:
        raise ConfigError(
            f"{config.path}: a streamed source has no numbered rows, which this command needs; leave streaming out, or "
            "write the rows to a file"
        )
    if config.path.startswith("puzzle:"):
        return open_puzzle(config.path, config.name)
    path, split = local_path(config.path)
    shards = expand_shards(config.path)
    if is_url(config.path):
        files = [local_copy(url) for url in shards]
        return TableRows([_open_file(file) for file in files], config.format, _image_root(config), config.name)
    if path is None and shards != [config.path]:
        tables = [_open_file(Path(shard).expanduser()) for shard in shards]
        path = Path(shards[0]).expanduser()
    elif path is None:
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


def _image_root(config: SourceConfig) -> Path:
    """Return the folder of the images of a source whose rows lie elsewhere: without ``image_root`` the current one."""
    return Path(config.image_root).expanduser() if config.image_root else Path.cwd()


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
        return labelled_row(row, self._name, table.label)


def labelled_row(row: Row, name: str | None, label: str) -> Row:
    """Return the row with its source: ``name``, else its own, else ``label``.

    Raises:
        RowError: a text has half a character.
    """
    for i, message in enumerate(row.messages):
        if surrogate := _SURROGATE.search(message.text):
            problem = f"has half a character, {surrogate[0]!r}"
            remedy = "write the text anew as UTF-8, or remove the row"
            raise RowError(row.where, f"messages[{i}].content", problem, remedy)
    source = name or row.source or label
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
    return [_open_file(file) for file in split_files(path, split)]


def split_files(path: Path, split: str | None) -> list[Path]:
    """Return the files with rows of a folder that are of ``split``.

    Raises:
        RowError: there are none, or files of several splits and ``split`` names none of them.
    """
    files = _list_files(path)
    if not files:
        raise RowError(str(path), "", f"has no {', '.join(SUFFIXES)} file", "name a file, or a folder with such files")
    files_by_split: dict[str, list[Path]] = {}
    for file in files:
        files_by_split.setdefault(_split_of(file), []).append(file)
    return _select_split(path, files_by_split, split)


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
    if not path.is_file():
        raise RowError(str(path), "", "there is no such file", "correct data.sources[].path")
    table: Table
    if path.suffix == ".jsonl":
        if path.stat().st_size == 0:
            raise RowError(str(path), "", "is empty", "give at least one row")
        table = LineTable(path)
    elif path.suffix == ".parquet":
        pattern = glob.escape(str(path))  # a path may have brackets
        dataset = load_table(str(path), "parquet", data_files=[pattern])
        table = ArrowTable(str(path), label_of(path), dataset)
    elif path.suffix == ".tar":
        table = TarTable(str(path))
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
    table = ArrowTable(str(path), label_of(path), dataset)
    _refuse_empty(table, path)
    return table


def _refuse_empty(table: Table, path: Path) -> None:
    if len(table) == 0:
        raise RowError(str(path), "", "has no rows", "give at least one row")


def _open_hub(path: str) -> Table:
    """Open a Hugging Face data set, ``name?split=..&config=..``."""
    name, options = parse_hub(path)
    dataset = load_table(path, name, **options)
    return ArrowTable(name, name, dataset)


def parse_hub(path: str) -> tuple[str, dict[str, Any]]:
    """Return the name of a Hugging Face data set and the options ``name`` and ``split`` of ``load_dataset``."""
    name, _, query = path.partition("?")
    if not _HUB_NAME.fullmatch(name) or Path(name).suffix in SUFFIXES:
        raise RowError(path, "", "there is no such file or folder", "correct data.sources[].path")
    options = dict(parse_qsl(query))
    unknown = sorted(set(options) - {"split", "config"})
    if unknown:
        raise ConfigError(f"{path}: {unknown[0]!r} is not known; a hub name takes ?split=..&config=..")
    return name, {"name": options.get("config"), "split": options.get("split", "train")}
