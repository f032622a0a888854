"""Source files at a URL of any protocol that ``fsspec`` has: s3://, gs://, hf://, https://, memory://."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import datasets
import fsspec
from filelock import FileLock
from fsspec.registry import known_implementations

from ovr_megatron.config import ConfigError
from ovr_megatron.data.schema import RowError

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def is_url(path: str) -> bool:
    """Return whether ``path`` begins with a protocol."""
    return _URL.match(path) is not None


def url_suffix(url: str) -> str:
    """Return the suffix of the file that a URL or path names."""
    return PurePosixPath(urlsplit(url).path).suffix


def file_system(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path there.

    Raises:
        ConfigError: the protocol is not known or chained, or the package that reads it is not installed.
    """
    if "::" in url:
        raise ConfigError(f"{url}: a chain of protocols is not read; give the URL of the file itself")
    protocol = url.partition("://")[0].lower()
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = known_implementations[protocol]["class"].partition(".")[0]
        raise ConfigError(f"{url}: {protocol}:// needs the package {package}; pip install {package}") from error
    except ValueError as error:
        raise ConfigError(f"{url}: the protocol {protocol}:// is not known ({error})") from error
    return system, path


def local_copy(url: str) -> Path:
    """Return a copy of the file at ``url`` in the cache of ``datasets``; a changed file is copied anew.

    Raises:
        RowError: there is no such file, or it cannot be read.
        ConfigError: as `file_system`.
    """
    system, path = file_system(url)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "files" / hashlib.sha256(url.encode()).hexdigest()
    remote = PurePosixPath(urlsplit(url).path)
    parent = remote.parent.name or urlsplit(url).netloc
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # One process of a machine copies, and the others wait for it.
        with FileLock(folder / "lock"):
            # What the store calls this state of the file; of https it is the URL alone.
            state = hashlib.sha256(str(system.ukey(path)).encode()).hexdigest()[:16]
            # Named as there, since statistics call the rows of a file `folder/file`.
            copy = folder / state / parent / remote.name
            if not copy.is_file():
                copy.parent.mkdir(parents=True, exist_ok=True)
                partial = copy.parent / "partial"
                system.get_file(path, str(partial))
                os.replace(partial, copy)
        return copy
    except (OSError, ValueError) as error:
        remedy = "correct data.sources[].path, the access to it or the connection"
        raise RowError(url, "", f"cannot be read ({type(error).__name__}: {error})", remedy) from error
