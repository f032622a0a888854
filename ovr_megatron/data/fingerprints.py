"""Fingerprints of prompts, to keep held-out problems out of the training streams."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable
from pathlib import Path

from ovr_megatron.config import ConfigError, DataConfig
from ovr_megatron.data.images import load_media
from ovr_megatron.data.schema import Row

_SHA256 = re.compile(r"[0-9a-f]{64}")


def fingerprint(row: Row, config: DataConfig | None = None) -> str:
    """Return the SHA-256 of the prompt: roles, text (runs of white space count as one) and RGB pixels.

    The answer, the options, the response, the source and the file format of an image do not enter.
    ``config`` bounds the images (default: the default limits).
    """
    digest = hashlib.sha256()
    for message in row.prompt:
        text = " ".join(message.text.split())
        # A zero byte after each: role and text must not run into one another.
        entry = f"{message.role}\0{text}\0"
        digest.update(entry.encode())
    images, videos = load_media(row, config or DataConfig())
    # All images before all frames: another order changes the fingerprints that files hold.
    for image in itertools.chain(images, *videos):
        size = f"{image.width}x{image.height}\0"
        digest.update(size.encode())
        digest.update(image.tobytes())
    return digest.hexdigest()


def write_fingerprints(rows: Iterable[Row], path: Path, config: DataConfig | None = None) -> int:
    """Write the fingerprints of ``rows`` to ``path``, one a line, sorted, and return how many differ."""
    fingerprints = sorted({fingerprint(row, config) for row in rows})
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{item}\n" for item in fingerprints]
    path.write_text("".join(lines))
    return len(fingerprints)


def read_fingerprints(path: Path) -> frozenset[str]:
    """Read a file of `write_fingerprints`; blank lines are skipped.

    Raises:
        ConfigError: there is no such file, or a line is not a SHA-256.
    """
    if not path.is_file():
        raise ConfigError(f"data.exclude={path}: there is no such file; write it with write_fingerprints or unset it")
    fingerprints = set()
    lines = path.read_text().splitlines()
    for line_number, line in enumerate(lines, start=1):
        item = line.strip().lower()
        if not item:
            continue
        if not _SHA256.fullmatch(item):
            beginning = item[:40]
            raise ConfigError(f"{path}:{line_number}: {beginning!r} is not a SHA-256; write one fingerprint a line")
        fingerprints.add(item)
    return frozenset(fingerprints)
