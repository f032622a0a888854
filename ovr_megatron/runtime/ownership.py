"""Decide which folders these tools may replace: those whose own record names every file in them.

A checkpoint has its ``manifest.json``; beside any other folder's files lies ``.ovr_megatron.json``::

    {"format": 1, "files": ["config.json", "model.safetensors"]}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ovr_megatron.runtime.files import write_json

RECORD = ".ovr_megatron.json"
FORMAT = 1
_MANIFEST = "manifest.json"  # see `ovr_megatron.checkpoint.manifest`


def write_record(folder: Path, *more: str) -> None:
    """Record every file below ``folder`` as written by these tools; with ``more``, add only these names.

    A checkpoint needs no record beside its manifest, and with ``more`` a folder of other software gets none.
    """
    recorded = recorded_files(folder)
    if more:
        if recorded is None or (folder / _MANIFEST).exists():
            return
        names = recorded | set(more)
    elif _names(folder / _MANIFEST, dict) is not None:
        return
    else:
        names = _present(folder)
    write_json(folder / RECORD, {"format": FORMAT, "files": sorted(names)}, indent=1)


def recorded_files(folder: Path) -> frozenset[str] | None:
    """Return the file names in the folder's own record or manifest; None: these tools did not write the folder."""
    for name, kind in ((RECORD, list), (_MANIFEST, dict)):
        names = _names(folder / name, kind)
        if names is not None:
            return names
    return None


def refusal(folder: Path) -> str | None:
    """Return why ``folder`` may not be replaced, and what to do about it; None: all of it was written by these tools.

    An empty folder may always be replaced.
    """
    if folder.is_dir() and not any(folder.iterdir()):
        return None
    recorded = recorded_files(folder) if folder.is_dir() else None
    if recorded is None:
        return (
            f"{folder} was not written by these tools (it has no manifest of theirs), so it is not replaced; "
            "remove it by hand or choose another folder"
        )
    foreign = sorted(_present(folder) - recorded)
    if foreign:
        more = f" and {len(foreign) - 1} more files" if len(foreign) > 1 else ""
        return (
            f"{folder} holds {foreign[0]}{more}, which these tools did not write, so it is not replaced; "
            "move that elsewhere or choose another folder"
        )
    return None


def _present(folder: Path) -> frozenset[str]:
    """Return every file below ``folder`` but the records themselves."""
    records = {RECORD, _MANIFEST} if _names(folder / _MANIFEST, dict) is not None else {RECORD}
    # A link to a folder counts as a file: to replace the folder would remove it.
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return frozenset(path.relative_to(folder).as_posix() for path in paths) - records


def _names(path: Path, kind: type) -> frozenset[str] | None:
    """Return the file names of the record at ``path``; None where it is no record of these tools."""
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("format") != FORMAT or not isinstance(record.get("files"), kind):
        return None
    if kind is dict and not {"step", "versions", "extra"} <= record.keys():
        return None
    return frozenset(map(str, record["files"]))
