"""The record of one bad input, for tests/soak/bad_inputs.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One command line that must be refused.

    Attributes:
        area: group in the table.
        name: what is wrong with the input.
        command: module (``-m NAME``) or script with its arguments; ``{tmp}`` is the folder of the case, ``{model}``,
            ``{checkpoint}`` and ``{set}`` are sound inputs.
        says: what the sentence must contain, in lower case.
        files: path below the folder of the case -> text or bytes.
        edits: calls that damage copies of sound inputs; each gets the folder of the case and the
            sound inputs.
    """

    area: str
    name: str
    command: tuple[str, ...]
    says: str
    files: dict[str, str | bytes] = field(default_factory=dict)
    edits: tuple[Callable[[Path, dict[str, Path]], None], ...] = ()
