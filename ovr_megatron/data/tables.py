"""Tables of decoded objects by index: lines of JSONL, rows of parquet and Hugging Face data, a JSON array.

JSONL, parquet and Hugging Face data go through ``datasets``: memory-mapped, a row is decoded when it is read.
JSONL is read as lines of text, so that rows may differ in form and an error can name its line.
"""

from __future__ import annotations

import errno
import glob
import json
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow.compute as pc

from ovr_megatron.data.schema import RowError

_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Table(Protocol):
    """Decoded objects by index, and the names under which errors and statistics know them."""

    label: str

    def __len__(self) -> int:
        """Return the number of objects."""

    def where(self, index: int) -> str:
        """Return the place of object ``index``."""

    def raw(self, index: int) -> Any:
        """Return object ``index`` as decoded from the file."""


class LineTable:
    """A JSONL file, held as lines; lines of nothing but white space are skipped."""

    def __init__(self, path: Path) -> None:
        """Map the file at ``path``."""
        self._path = path
        self.label = label_of(path)
        pattern = glob.escape(str(path))  # a path may have brackets
        # "utf-8-sig" drops a byte order mark.
        self._lines = load_table(str(path), "text", data_files=[pattern], encoding="utf-8-sig")
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
        return decode_line(line, self.where(index))


def decode_line(line: str, where: str) -> Any:
    """Decode the line of a JSONL file that stands at ``where``."""
    try:
        return json.loads(line)
    except ValueError as error:
        problem = f"is not JSON ({error}): {line[:60]!r}"
        raise RowError(where, "", problem, "write one JSON object a line, or remove the line") from error


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
        self.label = label_of(path)
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


def load_table(where: str, builder: str, split: str = "train", **options: Any) -> datasets.Dataset:
    """Call ``datasets.load_dataset`` and turn its errors into a `RowError` at ``where``."""
    datasets.disable_progress_bars()  # every rank would show its own
    try:
        return datasets.load_dataset(builder, split=split, **options)
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error  # the library wraps the error of the file or the cache
        check_cache(cause)
        remedy = "write the file anew"
        if isinstance(cause, UnicodeDecodeError):
            line_number = _undecodable_line(Path(where))
            where = f"{where}:{line_number}"
            remedy = "convert the file to UTF-8"
        raise RowError(where, "", f"cannot be read ({cause})", remedy) from error
    except (OSError, ValueError) as error:
        check_cache(error)
        remedy = "correct the name, ?split=.. and ?config=.., or go online"
        if "data_files" in options:
            remedy = "write the file anew, or give it the suffix of its form"
        raise RowError(where, "", f"cannot be loaded ({error})", remedy) from error


def check_cache(error: BaseException) -> None:
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


def label_of(path: Path) -> str:
    """Return ``folder/stem`` of a file: the name of its rows in statistics."""
    folder = path.resolve().parent
    return f"{folder.name}/{path.stem}"
