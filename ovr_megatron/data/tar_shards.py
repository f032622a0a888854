"""Tar shards in the form of WebDataset: members whose names agree up to the first dot are one row.

A shard is not extracted: an index of its members, which ``datasets`` keeps in its cache, says where each begins. The
names of members are keys alone and never become paths. Images are read when they are opened.
"""

from __future__ import annotations

import itertools
import json
import operator
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import datasets

from ovr_megatron.data.file_slices import FileSlice, open_file, read_slice
from ovr_megatron.data.media import IMAGE_COLUMNS, VIDEO_COLUMNS
from ovr_megatron.data.schema import RowError
from ovr_megatron.data.tables import check_cache, label_of

MAX_TEXT_BYTES = 2**26  # of a text or JSON member; one of any size could stand in a shard
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_TEXTS = ("txt", "text", "caption", "cls")
_IMAGES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")
_MEDIA_FIELDS = (*IMAGE_COLUMNS, *VIDEO_COLUMNS)
_MEMBER = {"name": datasets.Value("string"), "offset": datasets.Value("int64"), "size": datasets.Value("int64")}
_COLUMNS = datasets.Features(key=datasets.Value("string"), members=datasets.List(_MEMBER))
_VERSION = 2  # of the index: a change of its form makes old ones unused


@dataclass(frozen=True)
class Member:
    """A member of a shard: the key of its row, its name, its suffix, and where its content stands."""

    key: str
    name: str
    suffix: str
    offset: int
    size: int


def expand_shards(path: str) -> list[str]:
    """Return the paths that ``shard-{000000..000123}.tar`` stands for; a path without a range as it is.

    Raises:
        RowError: a range ends before it begins.
    """
    match = _RANGE.search(path)
    if match is None:
        return [path]
    first, last = match.groups()
    if int(last) < int(first):
        raise RowError(path, "", "has a range that ends before it begins", "write the smaller number first")
    paths = []
    for number in range(int(first), int(last) + 1):
        shard = path[: match.start()] + str(number).zfill(len(first)) + path[match.end() :]
        paths += expand_shards(shard)
    return paths


class TarTable:
    """The rows of one shard by index."""

    def __init__(self, path: str) -> None:
        """Open the shard at ``path``, whose index is written if it is not in the cache.

        Raises:
            RowError: the shard cannot be read, or has members that cannot be used.
        """
        self._path = path
        self.label = label_of(Path(path))
        self._index = _load_index(path)

    def __len__(self) -> int:
        """Return the number of keys."""
        return len(self._index)

    def where(self, index: int) -> str:
        """Return ``shard:key``."""
        return f"{self._path}:{self._index[index]['key']}"

    def raw(self, index: int) -> Any:
        """Return the columns of key ``index``: texts are read, images are `FileSlice` objects."""
        record = self._index[index]
        slices = [FileSlice(self._path, **member) for member in record["members"]]
        return row_of(record["key"], slices, read_slice, self.where(index))


def _load_index(path: str) -> datasets.Dataset:
    """Return key and members of every row of a shard, from the cache where the shard is unchanged."""
    stat = os.stat(path)
    datasets.disable_progress_bars()  # every rank would show its own
    # A text: the library would divide a list among several writers.
    settings = {"path": path, "stamp": f"{_VERSION}-{stat.st_size}-{stat.st_mtime_ns}"}
    try:
        # The library's lock lets one process of a machine write the index and the others wait.
        index = datasets.Dataset.from_generator(_index_rows, _COLUMNS, gen_kwargs=settings)
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        if isinstance(cause, RowError):
            raise cause from error
        check_cache(cause)
        raise RowError(path, "", f"cannot be read ({cause})", "write the file anew") from error
    except OSError as error:
        check_cache(error)
        raise RowError(path, "", f"cannot be read ({error})", "check the file and its permissions") from error
    return index


def _index_rows(path: str, stamp: str) -> Iterator[dict[str, Any]]:
    """Yield key and members of each row; ``stamp`` only tells the cache one state of the file from another."""
    seen: set[str] = set()
    with open_file(path) as file:
        for key, members in group_members(file, path):
            if key in seen:
                problem = "has members in several places of the shard"
                raise RowError(f"{path}:{key}", "", problem, "write the members of a key one after the other")
            seen.add(key)
            records = [{"name": m.name, "offset": m.offset, "size": m.size} for m in members]
            yield {"key": key, "members": records}
    if not seen:
        raise RowError(path, "", "has no rows", "give at least one member, such as 000.json")


def group_members(file: IO[bytes], path: str) -> Iterator[tuple[str, list[Member]]]:
    """Yield the keys of a shard in order, each with its members.

    Raises:
        RowError: the file is no such shard, is cut off, or a member is a link, a sparse file or twice there.
    """
    members = _regular_members(file, path)
    for key, group in itertools.groupby(members, key=operator.attrgetter("key")):
        row: list[Member] = []
        suffixes: set[str] = set()
        for member in group:
            if member.suffix in suffixes:
                problem = f"has the member {member.name!r} twice"
                raise RowError(f"{path}:{key}", member.suffix, problem, "remove one of the two")
            suffixes.add(member.suffix)
            row.append(member)
        yield key, row


def _regular_members(file: IO[bytes], path: str) -> Iterator[Member]:
    """Yield every file of a shard that is not hidden."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                # Else the library keeps every member of a shard in memory; its stubs leave the attribute out.
                tar.members = []  # type: ignore[attr-defined]
                if info.isdir():
                    continue
                folder, _, base = info.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key = f"{folder}/{stem}".lstrip("/")
                if not info.isreg() or info.issparse():
                    problem = f"the member {info.name!r} is a link, a device or a sparse file"
                    raise RowError(f"{path}:{key}", suffix, problem, "write the file itself into the shard")
                # Hidden files are notes of the system that wrote the shard.
                if stem:
                    yield Member(key, info.name, suffix.lower(), info.offset_data, info.size)
            # The library takes a header that is damaged or missing for the end: rows would be lost without a word.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no end of the archive at byte {tar.offset:,}")
    except (tarfile.TarError, EOFError) as error:
        remedy = "write the shard anew, as a tar file that is not compressed"
        raise RowError(path, "", f"is no intact tar file ({error})", remedy) from error


def row_of(
    key: str,
    slices: Sequence[FileSlice],
    read: Callable[[FileSlice], bytes],
    where: str,
) -> dict[str, Any]:
    """Return the columns of a row: the fields of its ``json``, its texts by suffix, its images in ``images``.

    Where the JSON names images, in a field such as ``image``, the image stands there; else all are in ``images``.

    Raises:
        RowError: a text or JSON cannot be read, or the JSON names some of the images only, or one that is not there.
    """
    columns: dict[str, Any] = {"__key__": key}
    images: dict[str, FileSlice] = {}
    for item in slices:
        base = item.name.rpartition("/")[2]
        suffix = base.partition(".")[2].lower()
        kind = suffix.rpartition(".")[2]
        if kind in _IMAGES:
            images[base] = item
            continue
        value: Any = base  # of a member that is not read: it shows in errors that there is one
        if kind == "json" or kind in _TEXTS:
            value = _read_text(item, kind, read, where)
        fields = value if suffix == "json" and isinstance(value, Mapping) else {suffix: value}
        for name, field in fields.items():
            if name in columns:
                raise RowError(where, name, "stands in the JSON and in a member", "give one of the two")
            columns[name] = field
    image_names: set[str] = set()
    row: dict[str, Any] = _place_images(columns, images, image_names, where)
    if images and not image_names:
        row["images"] = list(images.values())
    elif missing_names := sorted(set(images) - image_names):
        raise RowError(
            where, "json", f"does not name the image {missing_names[0]!r}", "name all images of the key, or none"
        )
    return row


def _read_text(item: FileSlice, kind: str, read: Callable[[FileSlice], bytes], where: str) -> Any:
    if item.size > MAX_TEXT_BYTES:
        problem = f"has {item.size:,} bytes, more than {MAX_TEXT_BYTES:,}"
        raise RowError(where, kind, problem, "shrink the member or remove the row")
    try:
        text = read(item).decode("utf-8-sig")
        return json.loads(text) if kind == "json" else text
    except OSError as error:
        raise RowError(where, kind, f"cannot be read ({error})", "check the shard and the connection") from error
    except ValueError as error:
        problem = f"the member {item.name!r} cannot be decoded ({error})"
        raise RowError(where, kind, problem, "write it anew as UTF-8") from error


def _place_images(value: Any, images: Mapping[str, FileSlice], image_names: set[str], where: str) -> Any:
    """Return a JSON value with the images in place of their names, at any depth; ``image_names`` gains the names."""
    if isinstance(value, list):
        return [_place_images(item, images, image_names, where) for item in value]
    if not isinstance(value, Mapping):
        return value
    result = {}
    for name, item in value.items():
        if name in _MEDIA_FIELDS:
            result[name] = _named_images(item, images, image_names, where, name)
        else:
            result[name] = _place_images(item, images, image_names, where)
    return result


def _named_images(value: Any, images: Mapping[str, FileSlice], image_names: set[str], where: str, field: str) -> Any:
    """Return the value of a media field with the images in place of their names.

    Raises:
        RowError: a name is that of no image of the key: files outside of the shard are not read.
    """
    if isinstance(value, list):
        return [_named_images(item, images, image_names, where, field) for item in value]
    if isinstance(value, Mapping) and value.get("bytes") is None:
        value = value.get("path")
    if not isinstance(value, str) or not value:
        return value
    base = value.rpartition("/")[2]
    if base not in images:
        remedy = f"name one of {', '.join(images) or '(none)'}"
        raise RowError(where, field, f"{value[:80]!r} is no image of this key", remedy)
    image_names.add(base)
    return images[base]
