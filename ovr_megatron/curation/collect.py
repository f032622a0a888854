"""Stage 1: convert the rows of every source to the project's form and store their images by content hash."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from pathlib import Path

from ovr_megatron.config import ConfigError, SourceConfig
from ovr_megatron.curation.settings import PrepareConfig
from ovr_megatron.curation.stage import PrepareStage, Work, listing
from ovr_megatron.data.images import encoded_image
from ovr_megatron.data.row_chats import converted_message
from ovr_megatron.data.row_json import row_to_json
from ovr_megatron.data.schema import (
    ENDLESS,
    ImagePart,
    Message,
    Part,
    Row,
    RowError,
    RowSource,
    TextPart,
    VideoPart,
)
from ovr_megatron.data.sources import open_source
from ovr_megatron.data.traces import continuation
from ovr_megatron.runtime.files import write_whole
from ovr_megatron.runtime.progress import Progress

IMAGES = "images"


def run(work: Work) -> None:
    """Read all sources in the order of the configuration.

    Raises:
        RowError: a row cannot be used, and ``collect.on_error`` is stop.
        ConfigError: an endless source without ``collect.limit``.
    """
    store = ImageStore(Path(work.config.dir), work.config)
    limit = work.config.collect.limit
    # All sources are opened and checked before the first row is read, which may be hours before the last.
    opened = [(source, open_source(source)) for source in work.config.data.sources]
    for source, rows in opened:
        if len(rows) >= ENDLESS and not limit:
            raise ConfigError(f"data.sources: {source.path} never ends; set collect.limit to a number of rows")
    counts = []
    for _, rows in opened:
        available = len(rows)
        counts.append(min(limit or available, available))
    with Progress(sum(counts), "collect", "row", inner=True) as progress:
        for (source, rows), count in zip(opened, counts, strict=True):
            kept_before = work.report.kept
            for index in range(count):
                _collect_row(work, store, source, rows, index)
                progress.update()
            if work.report.kept == kept_before:
                work.empty_sources.append(source.path)


def _collect_row(
    work: Work,
    store: ImageStore,
    source: SourceConfig,
    rows: RowSource,
    index: int,
) -> None:
    """Keep row ``index`` of a source with its images stored, or drop it if it cannot be used."""
    label = source.name or source.path
    try:
        row = rows[index]
        label = row.source
        messages = [store.message(message) for message in row.messages]
        stored = replace(row, messages=tuple(messages))
    except RowError as error:
        if work.config.collect.on_error == "stop":
            raise
        field = error.field or "file"
        record = {"where": error.where, "error": str(error)}
        work.drop(record, label, f"{field}: cannot be used")
        return
    if work.config.data.template == "think":
        stored = as_continuation(stored)
    if stored.response is not None:
        work.report.add_value("characters of a response", len(stored.response))
    work.keep(row_to_json(stored), label)


def as_continuation(row: Row) -> Row:
    """Convert the traces of a row, and cut off a ``<think>`` that opens its response: the template opens it."""
    messages = [converted_message(message) for message in row.messages]
    if row.response is not None:
        last = messages[-1]
        text = continuation(last.text)
        messages[-1] = replace(last, parts=(TextPart(text),))
    return replace(row, messages=tuple(messages))


class ImageStore:
    """Copies images below ``root/images``, each once, and names them relative to ``root``."""

    def __init__(self, root: Path, config: PrepareConfig) -> None:
        self._root = root
        self._config = config.data

    def message(self, message: Message) -> Message:
        """Store the images of a message, and return it with their names."""
        parts = [self._part(part) for part in message.parts]
        return replace(message, parts=tuple(parts))

    def _part(self, part: Part) -> Part:
        if isinstance(part, ImagePart):
            return self._image(part)
        if isinstance(part, VideoPart):
            frames = [self._image(frame) for frame in part.frames]
            return replace(part, frames=tuple(frames))
        return part

    def _image(self, part: ImagePart) -> ImagePart:
        if part.image is not None:  # a puzzle has drawn it; there is no encoded file yet
            png_part = replace(part, image=None, data=_png(part))
            return self._image(png_part)
        data = encoded_image(part, self._config)
        digest = hashlib.sha256(data).hexdigest()
        path = self._root / IMAGES / digest[:2] / digest
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, data)  # an interruption leaves no half image under a content hash
        return replace(part, path=path, data=None, file=None, frame=None, root=self._root)


def _png(part: ImagePart) -> bytes:
    buffer = io.BytesIO()
    assert part.image is not None
    part.image.save(buffer, "PNG")
    return buffer.getvalue()


def inputs(config: PrepareConfig) -> list[object]:
    """Return fingerprints of the files of every source."""
    fingerprints: list[object] = []
    for source in config.data.sources:
        fingerprints.append([source.path, listing(source.path)])
    return fingerprints


def settings(config: PrepareConfig) -> list[object]:
    """Return the settings on which the collected rows depend."""
    return [config.collect, config.data.sources, config.data.template]


STAGE = PrepareStage("collect", run, settings, inputs)
