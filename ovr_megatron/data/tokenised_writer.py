"""Write a tokenised set: its files in a hidden folder first, which is renamed when it is complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ovr_megatron.config import ConfigError
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.schema import RowError
from ovr_megatron.data.tokenised import (
    CONTEXT,
    FORMAT,
    MANIFEST,
    RECORD,
    SAMPLES,
    SKIPPED,
    TOKEN,
    TOKENS,
    Tokenisation,
    TokenisedFile,
    TokenisedManifest,
    TokenisedSource,
)
from ovr_megatron.runtime.files import write_whole


@dataclass
class Texts:
    """Tokenised samples of one source.

    Attributes:
        tokens: The samples' tokens one after the other, with the bit `CONTEXT` as in the file.
        lengths: Tokens of each sample.
        prompts: Tokens of each sample before its first target.
        rows: Index of each sample's row in the source.
        replies: Assistant messages of the rows, and how many of them are targets.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    prompts: np.ndarray
    rows: np.ndarray
    replies: tuple[int, int] = (0, 0)


class TokenisedWriter:
    """Writes a set to a hidden folder beside ``folder``, renamed when the ``with`` block ends without an error.

    Raises:
        ConfigError: there is something at ``folder``, or nothing was added.
    """

    def __init__(self, folder: str | Path, processor: Processor) -> None:
        """Begin an empty set; the remains of an interrupted writing are removed."""
        self.folder = Path(folder)
        if self.folder.exists():
            raise ConfigError(f"{self.folder} exists already; remove it or name another folder")
        # Beside the final folder and so on its file system: the rename is atomic.
        self._partial = self.folder.with_name(f".{self.folder.name}.partial")
        self._tokenisation = Tokenisation.of(processor)
        self._sources: list[TokenisedSource] = []
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._files: dict[str, _HashedFile] = {}
        for name in (TOKENS, SAMPLES, SKIPPED):
            self._files[name] = _HashedFile(self._partial / name)
        self._offset = 0  # tokens written
        self._largest_token = 0

    def begin_source(self, name: str, path: str, weight: float) -> None:
        """Begin a source: later calls of `add`, `skip` and `exclude` belong to it."""
        self._sources.append(TokenisedSource(name, path, weight))

    def add(self, texts: Texts) -> None:
        """Append samples."""
        records = np.zeros(len(texts.lengths), RECORD)
        ends = np.cumsum(texts.lengths)
        records["offset"] = self._offset + ends - texts.lengths
        records["length"] = texts.lengths
        records["prompt"] = texts.prompts
        records["row"] = texts.rows
        records["source"] = len(self._sources) - 1
        tokens = texts.tokens.astype(TOKEN)
        if len(ends):  # `np.split` would return one part for no sample
            parts = np.split(tokens, ends[:-1])
            records["crc32"] = [zlib.crc32(part.data) for part in parts]
        self._files[TOKENS].write(tokens.tobytes())
        self._files[SAMPLES].write(records.tobytes())
        self._offset += len(tokens)
        ids = tokens & ~CONTEXT
        largest = int(ids.max(initial=0))
        self._largest_token = max(self._largest_token, largest)
        replies, learned = texts.replies
        self._count(
            samples=len(records),
            tokens=len(tokens),
            replies=replies,
            learned=learned,
        )

    def skip(self, errors: Sequence[RowError]) -> None:
        """Record rows that were left out."""
        for error in errors:
            record = {
                "where": error.where,
                "field": error.field,
                "problem": error.problem,
            }
            line = json.dumps(record, ensure_ascii=False)
            self._files[SKIPPED].write(f"{line}\n".encode())
        self._count(skipped=len(errors))

    def exclude(self, count: int) -> None:
        """Count rows whose prompt ``data.exclude`` names."""
        self._count(excluded=count)

    def _count(self, **increments: int) -> None:
        """Add to fields of the current source."""
        source = self._sources[-1]
        counts = {}
        for name, increment in increments.items():
            counts[name] = getattr(source, name) + increment
        self._sources[-1] = replace(source, **counts)

    def finish(self) -> TokenisedManifest:
        """Write the manifest and rename the folder to its final name."""
        if not any(source.samples for source in self._sources):
            raise ConfigError(f"{self.folder}: no row of {len(self._sources)} sources can be used; correct them")
        files = {name: file.close() for name, file in self._files.items()}
        manifest = TokenisedManifest(
            self._tokenisation,
            tuple(self._sources),
            files,
            self._largest_token,
        )
        # Every file is on the disk before the rename makes the set visible: after a crash it is complete or absent.
        text = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1)
        write_whole(self._partial / MANIFEST, text, durable=True)
        self._partial.rename(self.folder)
        return manifest

    def __enter__(self) -> TokenisedWriter:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            # After a rename there is no folder of this name left.
            for file in self._files.values():
                file.file.close()
            shutil.rmtree(self._partial, ignore_errors=True)


class _HashedFile:
    """A file that is written from its beginning, with the SHA-256 of its bytes."""

    def __init__(self, path: Path) -> None:
        self.file: BinaryIO = path.open("wb")
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self._digest.update(data)

    def close(self) -> TokenisedFile:
        """Put the bytes on the disk and return their number and SHA-256, as in the manifest."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return {"bytes": self.file.tell(), "sha256": self._digest.hexdigest()}
