"""Count and list the rows that are left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ovr_megatron.config import DataConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.schema import Row, RowError
from ovr_megatron.runtime.appended import AppendedFile
from ovr_megatron.runtime.json_lines import read_json_lines


class SkippedRows:
    """Lists rows in a JSONL file, each once however often it is drawn, also by the runs that resume this one.

    Attributes:
        count: Rows listed.
    """

    def __init__(self, path: Path | None = None) -> None:
        """List in the file at ``path``; None only counts (every rank but the first)."""
        self._path = path
        self._file: AppendedFile | None = None
        self._listed: set[str] = set()
        if path is not None and path.exists():
            self._listed = {line["where"] for line in read_json_lines(path, "where")}

    @property
    def count(self) -> int:
        """Number of rows listed."""
        return len(self._listed)

    def add(self, error: RowError) -> None:
        """List the row of ``error`` with field and problem."""
        if error.where in self._listed:
            return
        self._listed.add(error.where)
        if self._path is not None:
            # Opened with the first row: a run that skips nothing has no list.
            self._file = self._file or AppendedFile(self._path)
            record = {
                "where": error.where,
                "field": error.field,
                "problem": error.problem,
            }
            line = json.dumps(record, ensure_ascii=False)
            # A problem may quote half a surrogate pair, which UTF-8 cannot hold.
            self._file.append(line.encode(errors="backslashreplace") + b"\n")


def skipped_rows(config: DataConfig, run: Path, main: bool) -> SkippedRows | None:
    """Return the list of a run's skipped rows, ``RUN/data/skipped.jsonl``; None where ``data.on_error`` is ``stop``.

    Args:
        config: Says whether rows are skipped.
        run: The run folder.
        main: Whether this process writes the list; the others count.
    """
    if config.on_error == "stop":
        return None
    return SkippedRows(run / "data" / "skipped.jsonl" if main else None)


def lengths_or_errors(
    processor: Processor,
    rows: Sequence[Row],
    generation: bool,
    skipped: SkippedRows | None,
    decode: bool = True,
) -> list[int | RowError]:
    """Return the tokens of each row's sample, or the error that leaves it out; errors are listed in ``skipped``.

    With ``decode``, images are decoded where rows are skipped.

    Raises:
        RowError: a row cannot be used, and there is no list for it.
    """
    try:
        # A damaged image must be known on every rank before one of them meets it in `Processor.encode`.
        decodes = decode and skipped is not None
        lengths: list[int | RowError] = [*processor.lengths(rows, generation, decodes)]
    except RowError as error:
        if skipped is None:
            raise
        # One by one, since the error names the first bad row alone.
        if len(rows) > 1:
            lengths = []
            for row in rows:
                lengths += lengths_or_errors(processor, [row], generation, skipped, decode)
            return lengths
        lengths = [error]
    for length in lengths:
        if isinstance(length, RowError) and skipped is not None:
            skipped.add(length)
    return lengths
