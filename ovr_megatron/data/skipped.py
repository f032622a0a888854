"""Rows that were left out, counted and listed."""

from __future__ import annotations

import json
from pathlib import Path

from ovr_megatron.data.schema import RowError


class SkippedRows:
    """Lists rows in a JSONL file, each once however often it is drawn, also by the runs that go on from this one.

    Attributes:
        count: Rows listed.
    """

    def __init__(self, path: Path | None = None) -> None:
        """List in the file at ``path``; None only counts (every rank but the first)."""
        self._path = path
        self._known: set[str] = set()
        if path is not None and path.exists():
            self._known = {json.loads(line)["where"] for line in path.read_text().splitlines()}

    @property
    def count(self) -> int:
        """Number of rows listed."""
        return len(self._known)

    def add(self, error: RowError) -> None:
        """List the row of ``error`` with field and problem."""
        if error.where in self._known:
            return
        self._known.add(error.where)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            line = {"where": error.where, "field": error.field, "problem": error.problem}
            with self._path.open("a") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
