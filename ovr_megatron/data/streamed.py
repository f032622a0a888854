"""Sources that are read from the beginning to the end without a copy: sets that do not fit a disk.

``datasets`` streams each shard (a file, or a part of a Hugging Face set) and says where it stands. Rows are shuffled
here, in blocks: the library's own shuffle buffer would be lost when a run is resumed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import datasets

from ovr_megatron.config import ConfigError, SourceConfig
from ovr_megatron.data.file_slices import FileSlice, open_file, read_slice
from ovr_megatron.data.formats import detect, find_reader
from ovr_megatron.data.remote_files import file_system, is_url, url_suffix
from ovr_megatron.data.schema import Row, RowError
from ovr_megatron.data.sources import labelled_row, local_path, parse_hub, split_files
from ovr_megatron.data.tables import decode_line, label_of
from ovr_megatron.data.tar_shards import expand_shards, group_members, row_of
from ovr_megatron.errors import UserError


class StreamError(UserError, OSError):
    """A stream that broke off: unlike a row it cannot be skipped."""


class StreamedState(TypedDict):
    """Position of a streamed source as JSON: where its block of rows begins, and how many of the block were taken.

    ``shard`` counts in the epoch's order of the shards, ``row`` in the shard; ``dataset`` is the library's own state.
    """

    identity: str
    epoch: int
    shard: int
    row: int
    dataset: dict[str, Any] | None
    taken: int


def _is_blank_line(item: Any) -> bool:
    return not item["text"].strip()


def _never_blank(item: Any) -> bool:
    return False


@dataclass(frozen=True)
class _Shard:
    """A part of a source that is read in order; ``decode`` turns item and number of an item into place and object.

    Blank items, of white space in a JSONL file, are counted and left out.
    """

    name: str
    label: str
    open: Callable[[], datasets.IterableDataset]
    decode: Callable[[Any, int], tuple[str, Callable[[], Any]]]
    is_blank: Callable[[Any], bool] = _never_blank


class StreamedRows:
    """The rows of a streamed source, epoch after epoch; every epoch has each row once.

    Shards are read in an order that depends on seed and epoch. ``shuffle_rows`` rows at a time are read and shuffled,
    so that a position needs no rows: a resumed run reads the block of the position again. Every rank reads all rows,
    as it does with other sources: the order is the same for any number of ranks.

    Attributes:
        length: None, since the number of rows is not known.
        name: What statistics call the rows; None where each row or file has its own.
        epoch: Epoch of the block of the next row, counted from 0.
    """

    length: int | None = None

    def __init__(self, config: SourceConfig, seed: str) -> None:
        """Find the shards; no row is read yet.

        Raises:
            RowError: there is no such file or data set, or it cannot be streamed.
        """
        self.name = config.name
        self.epoch = 0
        self._path = config.path
        self._shards, root = _open_shards(config.path)
        self._root = Path(config.image_root).expanduser() if config.image_root else root
        self._format = config.format
        if config.format != "auto":
            find_reader(config.format)  # an unknown name is an error now
        self._seed = seed
        self._block_rows = config.shuffle_rows
        names = [shard.name for shard in self._shards]
        identity = json.dumps([seed, self._block_rows, names])
        self._identity = hashlib.sha256(identity.encode()).hexdigest()
        self._go_to({"identity": "", "epoch": 0, "shard": 0, "row": 0, "dataset": None, "taken": 0})

    def _go_to(self, state: StreamedState) -> None:
        self.epoch = state["epoch"]
        self._start: StreamedState = {**state, "identity": self._identity, "taken": 0}
        self._taken = state["taken"]
        self._block: list[tuple[_Shard, str, Callable[[], Any]]] | None = None
        self._shard = state["shard"]
        self._row = state["row"]
        self._resumed = state["dataset"]
        self._dataset: datasets.IterableDataset | None = None
        self._items: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Row]:
        """Return the stream itself: there is one position."""
        return self

    def __next__(self) -> Row:
        """Return the next row.

        Raises:
            RowError: the row cannot be used; the next call returns the one after it.
            StreamError: a shard cannot be read, or there are no rows at all.
        """
        if self._block is None:
            self._block = self._read_block()
        while self._taken >= len(self._block):
            self._begin_block(bool(self._block))
            self._block = self._read_block()
        shard, where, load = self._block[self._taken]
        self._taken += 1
        raw = load()
        format_name = detect(raw, where) if self._format == "auto" else self._format
        row = find_reader(format_name)(raw, where, self._root)
        return labelled_row(row, self.name, shard.label)

    def state(self) -> StreamedState:
        """Return the position as JSON."""
        return {**self._start, "taken": self._taken}

    def load(self, state: StreamedState) -> None:
        """Go to a position.

        Raises:
            ConfigError: the position is that of other files, another seed or other blocks.
        """
        if state["identity"] != self._identity:
            raise ConfigError(
                f"data.sources: the checkpoint was written with other files, another seed or another shuffle_rows of "
                f"{self._path}; use the same, or another run.dir"
            )
        self._go_to(state)

    def _begin_block(self, has_rows: bool) -> None:
        """Let the next block begin where the last one ended."""
        if self._shard >= len(self._shards):
            if self._start["shard"] == 0 and self._start["row"] == 0 and not has_rows:
                raise StreamError(f"{self._path} has no rows; give at least one")
            self.epoch += 1
            self._shard = 0
            self._row = 0
            self._dataset = None
        dataset = None if self._dataset is None else self._dataset.state_dict()
        self._start = {
            "identity": self._identity,
            "epoch": self.epoch,
            "shard": self._shard,
            "row": self._row,
            "dataset": dataset,
            "taken": 0,
        }
        self._taken = 0

    def _read_block(self) -> list[tuple[_Shard, str, Callable[[], Any]]]:
        """Read and shuffle the rows from the position on, up to the size of a block or the end of the epoch."""
        order = list(range(len(self._shards)))
        random.Random(f"{self._seed}/{self.epoch}").shuffle(order)
        block: list[tuple[_Shard, str, Callable[[], Any]]] = []
        while len(block) < self._block_rows and self._shard < len(order):
            shard = self._shards[order[self._shard]]
            try:
                item = self._next_item(shard)
            except StopIteration:
                self._shard += 1
                self._row = 0
                self._dataset = None
                continue
            except (OSError, ValueError) as error:
                raise StreamError(
                    f"{shard.name} broke off after {self._row} rows ({error}); correct the file or the connection, "
                    "then the same command goes on from the last checkpoint"
                ) from error
            if not shard.is_blank(item):
                block.append((shard, *shard.decode(item, self._row)))
            self._row += 1
        # Seeded by where the block begins, so that a resumed run shuffles this block alone.
        begin = f"{self.epoch}/{self._start['shard']}/{self._start['row']}"
        random.Random(f"{self._seed}/{begin}").shuffle(block)
        return block

    def _next_item(self, shard: _Shard) -> Any:
        """Return the next item of the current shard, which is opened if it is not yet."""
        if self._dataset is None:
            self._dataset = shard.open()
            if self._resumed is not None:
                self._dataset.load_state_dict(self._resumed)
                self._resumed = None
            self._items = iter(self._dataset)
        return next(self._items)


def _open_shards(path: str) -> tuple[list[_Shard], Path]:
    """Return the shards of a source, and the folder in which its images stand."""
    local, split = local_path(path)
    ranges = expand_shards(path)
    if is_url(path):
        for url in ranges:
            file_system(url)  # a missing package is an error now
        return [_file_shard(url) for url in ranges], Path.cwd()
    if local is None and ranges == [path]:
        return _hub_shards(path), Path.cwd()
    if local is None:
        files = [Path(shard).expanduser() for shard in ranges]
    else:
        files = [local] if local.is_file() else split_files(local, split)
    root = local if local is not None and local.is_dir() else files[0].parent
    return [_file_shard(str(file)) for file in files], root


def _hub_shards(path: str) -> list[_Shard]:
    name, options = parse_hub(path)
    try:
        dataset = datasets.load_dataset(name, streaming=True, **options)
    except (OSError, ValueError) as error:
        remedy = "correct the name, ?split=.. and ?config=.., or go online"
        raise RowError(path, "", f"cannot be loaded ({error})", remedy) from error
    dataset = _without_decoding(dataset)
    count = dataset.num_shards
    shards = []
    for index in range(count):
        open_shard = partial(dataset.shard, num_shards=count, index=index)
        part = f"{path}#{index}"  # split and configuration are of its identity
        shards.append(_Shard(part, name, open_shard, partial(_decode_object, part)))
    return shards


def _file_shard(name: str) -> _Shard:
    path = Path(name)
    suffix = url_suffix(name) if is_url(name) else path.suffix
    pattern = name if is_url(name) else glob.escape(name)  # a path may have brackets
    if not is_url(name) and not path.is_file():
        raise RowError(name, "", "there is no such file", "correct data.sources[].path")
    if suffix == ".jsonl":
        load = partial(_load_file, "text", data_files=[pattern], encoding="utf-8-sig")
        return _Shard(name, label_of(path), load, partial(_decode_line, name), _is_blank_line)
    if suffix == ".parquet":
        load = partial(_load_file, "parquet", data_files=[pattern])
        return _Shard(name, label_of(path), load, partial(_decode_object, name))
    if suffix == ".tar" and not is_url(name):
        load = partial(datasets.IterableDataset.from_generator, _tar_rows, gen_kwargs={"path": name})
        return _Shard(name, label_of(path), load, partial(_decode_members, name))
    remedy = "give .jsonl or .parquet files, or .tar files on a disk, or leave streaming out"
    raise RowError(name, "", f"a {suffix or 'file without a suffix'} cannot be streamed", remedy)


def _load_file(builder: str, **options: Any) -> datasets.IterableDataset:
    dataset = datasets.load_dataset(builder, split="train", streaming=True, **options)
    return _without_decoding(dataset)


def _without_decoding(dataset: datasets.IterableDataset) -> datasets.IterableDataset:
    """Return the set with its images encoded; one that does not know its columns decodes none."""
    if dataset.features is None:
        return dataset
    return dataset.decode(False)


def _tar_rows(path: str) -> Iterator[dict[str, Any]]:
    """Yield key and members of each row of a tar shard."""
    with open_file(path) as file:
        for key, members in group_members(file, path):
            yield {"key": key, "members": [FileSlice(path, m.offset, m.size, m.name) for m in members]}


def _decode_line(name: str, item: Any, row: int) -> tuple[str, Callable[[], Any]]:
    where = f"{name}:{row + 1}"
    return where, partial(decode_line, item["text"], where)


def _decode_object(name: str, item: Any, row: int) -> tuple[str, Callable[[], Any]]:
    return f"{name}[{row}]", lambda: item


def _decode_members(name: str, item: Any, row: int) -> tuple[str, Callable[[], Any]]:
    where = f"{name}:{item['key']}"
    return where, partial(row_of, item["key"], item["members"], read_slice, where)
