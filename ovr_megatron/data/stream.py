"""An endless mixture of rows, whose order depends on the seed alone and whose position is a few numbers."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

from ovr_megatron.config import ConfigError, DataConfig, ValidationConfig
from ovr_megatron.data.fingerprints import fingerprint, read_fingerprints
from ovr_megatron.data.held_out import open_training_source
from ovr_megatron.data.schema import ENDLESS, Row, RowError, RowSource
from ovr_megatron.data.skipped import SkippedRows
from ovr_megatron.data.streamed import StreamedRows, StreamedState

_BARREN = 10_000  # consecutive excluded or skipped rows after which the stream gives up


Source = RowSource | StreamedRows


class RowPosition(NamedTuple):
    """Where a row of a stream lies: the number of its source, and its number there."""

    source: int
    row: int


class StreamState(TypedDict):
    """Position of a stream, as JSON: rows drawn and excluded in all, and taken of each source of a size.

    The size of a streamed source is None, and ``streamed`` holds the positions of such sources, in order.
    """

    seed: int
    sizes: list[int | None]
    drawn: int
    taken: list[int]
    excluded: int
    streamed: NotRequired[list[StreamedState]]


def source_length(source: Source) -> int | None:
    """Return the number of rows of a source; None where it has no end, or is streamed and does not say."""
    if isinstance(source, StreamedRows):
        return source.length
    size = len(source)
    return None if size >= ENDLESS else size


class RowStream:
    """Rows of several sources, each drawn with its weight.

    A finite source is walked in a new shuffle each epoch, without replacement; an endless source in order, from an
    index that depends on the seed.  A row whose fingerprint is excluded is left out and counted; a row that cannot be
    used is left out where there is a list for it.

    Attributes:
        excluded: Rows excluded so far.
        last_position: Of the row drawn last, of a source that is not streamed.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Source, float]],
        seed: int,
        exclude: frozenset[str] = frozenset(),
        config: DataConfig | None = None,
        skipped: SkippedRows | None = None,
    ) -> None:
        """Start at the first row.

        Args:
            sources: Rows and weights.
            seed: Decides the order.
            exclude: Fingerprints of prompts.
            config: Bounds the images of prompts.
            skipped: Lists rows that cannot be used; None stops at the first.
        """
        self._sources = [source for source, _ in sources]
        self._weights = [weight for _, weight in sources]
        self._streamed = [source for source in self._sources if isinstance(source, StreamedRows)]
        self._sizes = [None if isinstance(source, StreamedRows) else len(source) for source in self._sources]
        self._seed = seed
        self._exclude = exclude
        self._config = config
        self._skipped = skipped
        self._drawn = 0  # rows of all sources
        self._taken = [0] * len(sources)  # rows of each source
        self.excluded = 0
        self.last_position = RowPosition(0, 0)
        self._orders: dict[int, tuple[int, list[int]]] = {}  # by source: an epoch and its shuffle

    def __iter__(self) -> Iterator[Row]:
        """Return the stream itself: there is one position."""
        return self

    def __next__(self) -> Row:
        """Draw a row.

        Raises:
            RowError: the row cannot be used, or every row is excluded.
        """
        where = ""
        for _ in range(_BARREN):
            # A generator of its own for each draw: the position needs no state of a generator.
            draw = random.Random(f"{self._seed}#{self._drawn}")
            [source] = draw.choices(range(len(self._sources)), self._weights)
            self._drawn += 1
            try:
                row = self._next_row(source)
                if not self._is_excluded(row):
                    return row
                where = row.where
                self.excluded += 1
            except RowError as error:
                if self._skipped is None:  # data.on_error=stop
                    raise
                where = error.where
                self._skipped.add(error)
        remedy = "remove data.exclude, correct the rows or add other sources"
        raise RowError(where, "messages", f"{_BARREN} rows in a row are excluded or cannot be used", remedy)

    @property
    def drawn(self) -> int:
        """Rows drawn so far of all sources, those left out included."""
        return self._drawn

    def has_epochs(self, source: int) -> bool:
        """Return whether rows of the source of this number come again: it has an end, and is not streamed."""
        size = self._sizes[source]
        return size is not None and size < ENDLESS

    def row(self, position: RowPosition) -> Row:
        """Return the row at ``position``, wherever the stream stands.

        Raises:
            RowError: the row cannot be used any more.
            TypeError: the source is streamed.
        """
        opened = self._sources[position.source]
        if isinstance(opened, StreamedRows):
            raise TypeError("a streamed source has no numbered rows")
        return opened[position.row]

    def absent_sources(self, names: Iterable[str]) -> list[str]:
        """Return those of ``names`` that are the source of no row.

        Rows are read, of all sources in turn, until every name has occurred; an endless source has one name.
        """
        missing = set(names) - {source.name for source in self._streamed}
        if not missing:
            return []
        # Which sources the rows of a stream name, nobody knows before its end.
        if any(source.name is None for source in self._streamed):
            return []
        orders = map(self._reading_order, range(len(self._sources)))
        # In turn: most names occur early, and a large source need not be read to its end.
        for indices in zip_longest(*orders):
            for source, index in enumerate(indices):
                if not missing:
                    return []
                if index is not None:
                    missing.discard(self._source_name(source, index))
        return sorted(missing)

    def _is_excluded(self, row: Row) -> bool:
        # Without a list no fingerprint is computed: it opens the images.
        if not self._exclude:
            return False
        return fingerprint(row, self._config) in self._exclude

    def _reading_order(self, source: int) -> list[int]:
        """Return the indices of a source's rows in an order that mixes the parts of a file; of an endless source, 0."""
        size = self._sizes[source]
        if size is None:
            return []
        if size >= ENDLESS:
            return [0]
        order = list(range(size))
        shuffler = random.Random(f"{self._seed}/{source}")
        shuffler.shuffle(order)
        return order

    def _source_name(self, source: int, index: int) -> str | None:
        """Return the ``source`` of a row; None of an unusable row, which is reported when it is drawn."""
        opened = self._sources[source]
        assert not isinstance(opened, StreamedRows), "a streamed source has no indices"
        try:
            return opened[index].source
        except RowError:
            return None

    def _next_row(self, source: int) -> Row:
        """Take the next row of a source; one that cannot be used is taken, too."""
        opened = self._sources[source]
        if isinstance(opened, StreamedRows):
            self._taken[source] += 1
            return next(opened)
        index = self._next_index(source, len(opened))
        self._taken[source] += 1
        self.last_position = RowPosition(source, index)
        return opened[index]

    def _next_index(self, source: int, size: int) -> int:
        """Return the index of the next row of a source of ``size`` rows."""
        taken = self._taken[source]
        if size >= ENDLESS:
            # Generated rows are new ones at every index: no shuffle is needed.
            start = random.Random(f"{self._seed}/{source}").randrange(size)
            return (start + taken) % size
        epoch, position = divmod(taken, size)
        shuffled_epoch, order = self._orders.get(source, (-1, []))
        if shuffled_epoch != epoch:
            order = list(range(size))
            # A generator of its own for each epoch, so that a resumed run shuffles this one alone.
            shuffler = random.Random(f"{self._seed}/{source}/{epoch}")
            shuffler.shuffle(order)
            self._orders[source] = (epoch, order)
        return order[position]

    def state(self) -> StreamState:
        """Return the position as JSON."""
        state: StreamState = {
            "seed": self._seed,
            "sizes": list(self._sizes),
            "drawn": self._drawn,
            "taken": list(self._taken),
            "excluded": self.excluded,
        }
        if self._streamed:
            state["streamed"] = [source.state() for source in self._streamed]
        return state

    def load(self, state: StreamState) -> None:
        """Go to a position.

        Raises:
            ConfigError: the position is that of a stream with another seed, or other sources.
        """
        comparisons = (
            ("run.seed", state["seed"], self._seed),
            ("rows to train on, by source,", state["sizes"], self._sizes),
        )
        # Another seed or another file has its rows in another order: the position would mean other rows.
        for key, stored, current in comparisons:
            if stored != current:
                raise ConfigError(
                    f"data.sources: the checkpoint was written with {key} {stored}, this run has {current}; "
                    "use the same run.seed, data.sources and, for rows that are held out, validation.share and "
                    "validation.rows, or another run.dir with model.path at the checkpoint"
                )
        for source, position in zip(self._streamed, state.get("streamed", []), strict=True):
            source.load(position)
        self._drawn = state["drawn"]
        self._taken = list(state["taken"])
        self.excluded = state["excluded"]


def open_stream(
    config: DataConfig,
    seed: int,
    skipped: SkippedRows | None = None,
    validation: ValidationConfig | None = None,
) -> RowStream:
    """Open every source of ``config`` as one stream, without the rows that ``validation`` holds out.

    ``skipped`` as of `RowStream`.

    Raises:
        ConfigError: there is no source, or of one no row is left.
        RowError: a source cannot be read.
    """
    if not config.sources:
        raise ConfigError("data.sources is empty: give at least one, for example 'data.sources=[{path: rows.jsonl}]'")
    exclude: frozenset[str] = frozenset()
    if config.exclude:
        exclude = read_fingerprints(Path(config.exclude))
    sources: list[tuple[Source, float]] = []
    for index, source in enumerate(config.sources):
        # The index, so that a set that is named twice comes in two orders.
        opened: Source
        # Rows can be held out of a source that has numbers for them; another one is refused as it is opened.
        if source.streaming and not (validation and validation.holds_out):
            opened = StreamedRows(source, f"{seed}/{index}")
        else:
            opened = open_training_source(source, validation)
        sources.append((opened, source.weight))
    return RowStream(sources, seed, exclude, config, skipped)
