"""A tokenised set: texts as token ids in a folder, written once (`ovr_megatron.data.tokenised_writer`) and mapped.

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
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypedDict

import numpy as np

from ovr_megatron.config import ConfigError
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.samples import Sample
from ovr_megatron.data.schema import Row, RowError

MANIFEST = "manifest.json"
TOKENS = "tokens.bin"
SAMPLES = "samples.bin"
SKIPPED = "skipped.jsonl"
FORMAT = 1
TOKEN = np.dtype("<u4")
CONTEXT = TOKEN.type(1 << 31)  # bit of a token behind the prompt that is no target: it stands between two replies
RECORD = np.dtype(
    [
        ("offset", "<i8"),  # index of the first token
        ("row", "<i8"),  # index in the source
        ("length", "<i4"),  # tokens
        ("prompt", "<i4"),  # tokens before the first target
        ("source", "<i4"),  # index in the manifest
        ("crc32", "<u4"),  # of the tokens as they are stored
    ]
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
        # The list of skipped rows does not count: no sample depends on it.
        digests = [self.files[name]["sha256"] for name in (TOKENS, SAMPLES)]
        return _sha256("".join(digests))


class TokenisedSet:
    """The samples of a set, by index, as `Processor.encode` makes them of the rows.

    Attributes:
        manifest: The set's ``manifest.json``.
        lengths: int32[N], tokens of each sample.
        prompts: int32[N], tokens of each sample before its first target.
        sources: int32[N], index into ``manifest.sources``.
        weights: How often an epoch has each sample of a source.
        work: int64[N], the squared length of each sample.
        digest: A fingerprint of the contents.
        dropped: Zero: what was left out is counted in the manifest.
        title: The setting that names the set, for errors.

    Raises:
        RowError: the folder is no set, or a file of it is missing, cut off or changed.
        ConfigError: it was written with another tokenizer, vocabulary or template than ``processor`` has.
    """

    title = "data.tokenised"
    dropped = 0

    def __init__(self, folder: str | Path, processor: Processor) -> None:
        """Open the set at ``folder`` for the model of ``processor``."""
        self.folder = Path(folder)
        self.manifest = read_tokenised_manifest(self.folder)
        _check_tokenisation(self.folder, self.manifest.tokenisation, processor)
        self._vocab = processor.shape.vocab
        largest = self.manifest.largest_token
        if largest is not None and largest >= self._vocab:
            raise ConfigError(_vocabulary_message(self.folder, largest, self._vocab))
        files = self.manifest.files
        # A cut-off file is noticed here; its tokens are compared with their checksums when they are read.
        for name in (TOKENS, SAMPLES):
            _check_size(self.folder / name, files[name]["bytes"])
        records = read_records(folder)
        digest = hashlib.sha256(records.tobytes()).hexdigest()
        if digest != files[SAMPLES]["sha256"]:
            raise RowError(str(self.folder / SAMPLES), "", "was changed: its SHA-256 is another one", _AGAIN)
        # Mapped and not read: the processes of a machine share its pages.
        self._tokens = np.memmap(self.folder / TOKENS, TOKEN, mode="r")
        self._records = records
        self._patch_dim = processor.shape.vision.patch_dim
        # Contiguous copies: a field of the records has a stride of 32 bytes.
        self.lengths = np.ascontiguousarray(records["length"])
        self.prompts = np.ascontiguousarray(records["prompt"])
        self.sources = np.ascontiguousarray(records["source"])
        # In int64: the squares of lengths over 46,340 do not fit into int32.
        self.work = self.lengths.astype(np.int64) ** 2
        self.weights = [source.weight for source in self.manifest.sources]
        self.digest = self.manifest.digest

    def __len__(self) -> int:
        """Return N."""
        return len(self._records)

    def where(self, index: int) -> str:
        """Return the row that sample ``index`` was made of, as ``path[row]``, rows counted from 0."""
        record = self._records[index]
        source = self.manifest.sources[record["source"]]
        return f"{source.path}[{record['row']}]"

    def samples(self, indices: Sequence[int] | np.ndarray) -> list[Sample]:
        """Return several samples; errors as of a single one."""
        return [self[int(index)] for index in indices]

    def replies(self, indices: np.ndarray) -> tuple[int, int]:
        """Return zeros: a set does not hold the replies by sample, its manifest counts those of each source."""
        return 0, 0

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
        start = record["offset"]
        stored = self._tokens[start : start + record["length"]]
        if zlib.crc32(stored.data) != record["crc32"]:
            problem = f"the tokens of sample {index} ({self.where(index)}) were changed"
            raise RowError(str(self.folder / TOKENS), "", problem, _AGAIN)
        tokens = (stored & ~CONTEXT).astype(np.int64)
        prompt = int(record["prompt"])
        # Of every sample: sets of an earlier version do not record their largest token.
        largest = int(tokens.max(initial=0))
        if largest >= self._vocab:
            raise ConfigError(_vocabulary_message(self.folder, largest, self._vocab))
        source = self.manifest.sources[record["source"]]
        positions = np.arange(len(tokens))
        is_behind_prompt = positions >= prompt
        # Text alone: the three rows of positions are equal, and there is no patch.
        return Sample(
            tokens=tokens,
            loss_mask=is_behind_prompt & (stored < CONTEXT),
            position_ids=np.tile(positions, (3, 1)),
            patches=np.zeros((0, self._patch_dim), np.float32),
            grid_thw=np.zeros((0, 3), np.int64),
            placement=np.zeros(0, np.int64),
            images=[],
            videos=[],
            prompt_tokens=tokens[:prompt].tolist(),
            row=Row((), source=source.name, where=self.where(index)),
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
        tokenisation = Tokenisation(**raw["tokenisation"])
        return TokenisedManifest(tokenisation, sources, files, raw.get("largest_token"))
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
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != record["sha256"]:
            raise RowError(str(path), "", "was changed: its SHA-256 is another one", _AGAIN)
    return manifest


def _check_tokenisation(folder: Path, of_set: Tokenisation, processor: Processor) -> None:
    """Raise `ConfigError` for the first field in which the set's tokenisation is not that of ``processor``."""
    of_model = Tokenisation.of(processor)
    # In the order of the fields: another tokenizer is named before the template that comes with it.
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
    size = path.stat().st_size
    if size != expected:
        raise RowError(str(path), "", f"has {size} bytes instead of {expected}", _AGAIN)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
