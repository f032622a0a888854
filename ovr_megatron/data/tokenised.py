"""A tokenised set: texts as token ids in a folder, written once and mapped into memory for reading.

::

    DIR/
      tokens.bin      uint32, the samples' tokens one after the other; behind the first target of a sample, the highest
                      bit of a token says that the token is no target
      samples.bin     one `RECORD` a sample
      skipped.jsonl   rows that were left out, with the reason
      manifest.json   written last: sources, tokenizer and template, sizes and SHA-256 of the other files

Opening reads ``samples.bin`` (32 bytes a sample) and looks at the size of ``tokens.bin``; a sample's tokens are
compared with their checksum when they are read.  Numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import BinaryIO, TypedDict

import numpy as np

from ovr_megatron.config import ConfigError
from ovr_megatron.data.processing import Processor, Sample
from ovr_megatron.data.schema import Row, RowError
from ovr_megatron.runtime.files import write_whole

MANIFEST = "manifest.json"
TOKENS = "tokens.bin"
SAMPLES = "samples.bin"
SKIPPED = "skipped.jsonl"
FORMAT = 1
TOKEN = np.dtype("<u4")
CONTEXT = TOKEN.type(1 << 31)  # bit of a token behind the prompt that is no target: it stands between two replies
# Index of the first token, index of the row in its source, tokens, tokens of the prompt, index of the source, checksum.
RECORD = np.dtype(
    [("offset", "<i8"), ("row", "<i8"), ("length", "<i4"), ("prompt", "<i4"), ("source", "<i4"), ("crc32", "<u4")]
)
_AGAIN = "copy the set again, or write it anew with ovr tokenise"


@dataclass(frozen=True)
class Tokenisation:
    """Tokenizer and template, on which the tokens of a text depend.

    Attributes:
        tokenizer: SHA-256 of the tokenizer in serialised form, whichever files it was loaded from.
        vocabulary: Number of its tokens.
        end_token: Id that closes a response.
        template: ``data.template``.
        chat_template: SHA-256 of the Jinja source.
    """

    tokenizer: str
    vocabulary: int
    end_token: int
    template: str
    chat_template: str

    @staticmethod
    def of(processor: Processor) -> Tokenisation:
        """Return the tokenisation of ``processor``."""
        serialised = json.loads(processor.tokenizer.backend_tokenizer.to_str())
        for call_option in ("truncation", "padding"):  # set by calls, not by the folder
            serialised.pop(call_option, None)
        return Tokenisation(
            tokenizer=_sha256(json.dumps(serialised, sort_keys=True)),
            vocabulary=len(processor.tokenizer),
            end_token=processor.end_token,
            template=processor.config.template,
            chat_template=_sha256(str(processor.chat_template)),
        )


@dataclass(frozen=True)
class TokenisedSource:
    """One source of a set: an epoch has each of its samples ``weight`` times.

    ``replies`` are the assistant messages of its rows, of which ``learned`` are targets.
    """

    name: str
    path: str
    weight: float
    samples: int = 0
    tokens: int = 0
    replies: int = 0
    learned: int = 0
    skipped: int = 0
    excluded: int = 0


class TokenisedFile(TypedDict):
    """Size and SHA-256 of a file, as in the manifest."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class TokenisedManifest:
    """The contents of a set.

    ``files`` gives size in bytes and SHA-256 by name.  ``largest_token`` is the largest id of all samples; None in sets
    that were written before it was recorded, whose ids are checked when a sample is read.
    """

    tokenisation: Tokenisation
    sources: tuple[TokenisedSource, ...]
    files: dict[str, TokenisedFile]
    largest_token: int | None = None

    @property
    def digest(self) -> str:
        """A fingerprint of the contents."""
        return _sha256("".join(self.files[name]["sha256"] for name in (TOKENS, SAMPLES)))


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
        self._files = {name: _HashedFile(self._partial / name) for name in (TOKENS, SAMPLES, SKIPPED)}
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
            records["crc32"] = [zlib.crc32(part.data) for part in np.split(tokens, ends[:-1])]
        self._files[TOKENS].write(tokens.tobytes())
        self._files[SAMPLES].write(records.tobytes())
        self._offset += len(tokens)
        replies, learned = texts.replies
        self._largest_token = max(self._largest_token, int((tokens & ~CONTEXT).max(initial=0)))
        self._count(samples=len(records), tokens=len(tokens), replies=replies, learned=learned)

    def skip(self, errors: Sequence[RowError]) -> None:
        """Record rows that were left out."""
        for error in errors:
            line = {"where": error.where, "field": error.field, "problem": error.problem}
            self._files[SKIPPED].write((json.dumps(line, ensure_ascii=False) + "\n").encode())
        self._count(skipped=len(errors))

    def exclude(self, count: int) -> None:
        """Count rows whose prompt ``data.exclude`` names."""
        self._count(excluded=count)

    def _count(self, **increments: int) -> None:
        """Add to fields of the current source."""
        source = self._sources[-1]
        counts = {name: getattr(source, name) + increment for name, increment in increments.items()}
        self._sources[-1] = replace(source, **counts)

    def finish(self) -> TokenisedManifest:
        """Write the manifest and rename the folder to its final name."""
        if not any(source.samples for source in self._sources):
            raise ConfigError(f"{self.folder}: no row of {len(self._sources)} sources can be used; correct them")
        files = {name: file.close() for name, file in self._files.items()}
        manifest = TokenisedManifest(self._tokenisation, tuple(self._sources), files, self._largest_token)
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


class TokenisedSet:
    """The samples of a set, by index, as `Processor.encode` makes them of the rows.

    Attributes:
        manifest: The set's ``manifest.json``.
        lengths: int32[N], tokens of each sample.
        prompts: int32[N], tokens of each sample before its first target.
        sources: int32[N], index into ``manifest.sources``.

    Raises:
        RowError: the folder is no set, or a file of it is missing, cut off or changed.
        ConfigError: it was written with another tokenizer, vocabulary or template than ``processor`` has.
    """

    def __init__(self, folder: str | Path, processor: Processor) -> None:
        """Open the set at ``folder`` for the model of ``processor``."""
        self.folder = Path(folder)
        self.manifest = read_tokenised_manifest(self.folder)
        _check_tokenisation(self.folder, self.manifest.tokenisation, processor)
        self._vocab = processor.shape.vocab
        if (self.manifest.largest_token or 0) >= self._vocab:
            raise ConfigError(_vocabulary_message(self.folder, self.manifest.largest_token, self._vocab))
        # A cut-off file is noticed here; its tokens are compared with their checksums when they are read.
        for name in (TOKENS, SAMPLES):
            _check_size(self.folder / name, self.manifest.files[name]["bytes"])
        records = read_records(folder)
        if hashlib.sha256(records.tobytes()).hexdigest() != self.manifest.files[SAMPLES]["sha256"]:
            raise RowError(str(self.folder / SAMPLES), "", "was changed: its SHA-256 is another one", _AGAIN)
        # Mapped and not read: the processes of a machine share its pages.
        self._tokens = np.memmap(self.folder / TOKENS, TOKEN, mode="r")
        self._records = records
        self._patch_dim = processor.shape.vision.patch_dim
        self.lengths = np.ascontiguousarray(records["length"])
        self.prompts = np.ascontiguousarray(records["prompt"])
        self.sources = np.ascontiguousarray(records["source"])

    def __len__(self) -> int:
        """Return N."""
        return len(self._records)

    def where(self, index: int) -> str:
        """Return the row that sample ``index`` was made of, as ``path[row]``, rows counted from 0."""
        record = self._records[index]
        return f"{self.manifest.sources[record['source']].path}[{record['row']}]"

    def __getitem__(self, index: int) -> Sample:
        """Return sample ``index``.

        Raises:
            IndexError: there is none.
            RowError: its tokens were changed since they were written.
            ConfigError: a token lies past the model's vocabulary.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        record = self._records[index]
        stored = self._tokens[record["offset"] : record["offset"] + record["length"]]
        if zlib.crc32(stored.data) != record["crc32"]:
            problem = f"the tokens of sample {index} ({self.where(index)}) were changed"
            raise RowError(str(self.folder / TOKENS), "", problem, _AGAIN)
        tokens = (stored & ~CONTEXT).astype(np.int64)
        prompt = int(record["prompt"])
        if (largest := tokens.max(initial=0)) >= self._vocab:
            raise ConfigError(_vocabulary_message(self.folder, int(largest), self._vocab))
        # Text alone: the three rows of positions are equal, and there is no patch.
        return Sample(
            tokens=tokens,
            loss_mask=(np.arange(len(tokens)) >= prompt) & (stored < CONTEXT),
            position_ids=np.tile(np.arange(len(tokens)), (3, 1)),
            patches=np.zeros((0, self._patch_dim), np.float32),
            grid_thw=np.zeros((0, 3), np.int64),
            placement=np.zeros(0, np.int64),
            images=[],
            videos=[],
            prompt_tokens=tokens[:prompt].tolist(),
            row=Row((), source=self.manifest.sources[record["source"]].name, where=self.where(index)),
        )


def read_records(folder: str | Path) -> np.ndarray:
    """Return the `RECORD` of every sample of a set."""
    return np.fromfile(Path(folder) / SAMPLES, RECORD)


def read_tokenised_manifest(folder: str | Path) -> TokenisedManifest:
    """Return the manifest of the set at ``folder``.

    Raises:
        RowError: there is none, or it is of another format.
    """
    path = Path(folder) / MANIFEST
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise RowError(str(path), "", "does not exist", "name a folder that ovr tokenise wrote") from None
    except ValueError as error:
        raise RowError(str(path), "", f"is not JSON ({error})", _AGAIN) from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise RowError(str(path), "format", f"is not {FORMAT}", "write the set anew with ovr tokenise")
    try:
        sources = tuple(TokenisedSource(**source) for source in raw["sources"])
        files: dict[str, TokenisedFile] = {}
        for name in (TOKENS, SAMPLES):  # nothing depends on the list of skipped rows
            file = raw["files"][name]
            files[name] = {"bytes": file["bytes"], "sha256": file["sha256"]}
        return TokenisedManifest(Tokenisation(**raw["tokenisation"]), sources, files, raw.get("largest_token"))
    except (KeyError, TypeError) as error:
        raise RowError(str(path), "", f"lacks a field or has one too many ({error})", _AGAIN) from None


def verify_tokenised(folder: str | Path) -> TokenisedManifest:
    """Read every byte of the set at ``folder`` and compare it with the manifest.

    Raises:
        RowError: names the file that is missing, cut off or changed.
    """
    manifest = read_tokenised_manifest(folder)
    for name, record in manifest.files.items():
        path = Path(folder) / name
        _check_size(path, record["bytes"])
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != record["sha256"]:
                raise RowError(str(path), "", "was changed: its SHA-256 is another one", _AGAIN)
    return manifest


def _check_tokenisation(folder: Path, of_set: Tokenisation, processor: Processor) -> None:
    """Raise `ConfigError` for the first field in which the set's tokenisation is not that of ``processor``."""
    of_model = Tokenisation.of(processor)
    for item in fields(Tokenisation):
        set_value = getattr(of_set, item.name)
        model_value = getattr(of_model, item.name)
        if set_value != model_value:
            raise ConfigError(
                f"data.tokenised={folder} was written with {item.name} {set_value}, model.path and data.template give "
                f"{model_value}; choose the model and template it was written for, or write it anew with "
                "ovr tokenise"
            )


def _vocabulary_message(folder: Path, token: int | None, vocab: int) -> str:
    return (
        f"data.tokenised={folder} holds token {token}, and the model's vocabulary ends at {vocab}; choose the model it "
        "was written for, or write it anew with ovr tokenise"
    )


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise RowError(str(path), "", "is missing", _AGAIN)
    if path.stat().st_size != expected:
        raise RowError(str(path), "", f"has {path.stat().st_size} bytes instead of {expected}", _AGAIN)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
