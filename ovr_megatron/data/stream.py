"""An endless mixture of rows, whose order depends on the seed alone and whose position is a few numbers."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple, TypedDict

from ovr_megatron.config import ConfigError, DataConfig, ValidationConfig
from ovr_megatron.data.fingerprints import fingerprint, read_fingerprints
from ovr_megatron.data.held_out import open_training_source
from ovr_megatron.data.schema import ENDLESS, Row, RowError, RowSource
from ovr_megatron.data.skipped import SkippedRows

_BARREN = 10_000  # consecutive excluded or skipped rows after which the stream gives up


class RowPosition(NamedTuple):
    """Where a row of a stream lies: the number of its source, and its index there."""

    source: int
    index: int


class StreamState(TypedDict):
    """Position of a stream, as JSON: rows drawn and excluded in all, and taken of each source of a size."""

    seed: int
    sizes: list[int]
    drawn: int
    taken: list[int]
    excluded: int


class RowStream:
    """Rows of several sources, each drawn with its weight.

    A finite source is walked in a new shuffle each epoch, without replacement; an endless source in order, from an
    index that depends on the seed.  A row whose fingerprint is excluded is left out and counted; a row that cannot be
    used is left out where there is a list for it.

    Attributes:
        excluded: Rows excluded so far.
        last_position: Of the row drawn last.
    """

    def __init__(
        self,
        sources: Sequence[tuple[RowSource, float]],
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
            index = self._next_index(source)
            self._taken[source] += 1
            self.last_position = RowPosition(source, index)
            try:
                row = self._sources[source][index]
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

    def row(self, position: RowPosition) -> Row:
        """Return the row at ``position``, wherever the stream stands.

        Raises:
            RowError: the row cannot be used any more.
        """
        return self._sources[position.source][position.index]

    def absent_sources(self, names: Iterable[str]) -> list[str]:
        """Return those of ``names`` that are the source of no row.

        Rows are read, of all sources in turn, until every name has occurred; an endless source has one name.
        """
        missing = set(names)
        if not missing:
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
        size = len(self._sources[source])
        if size >= ENDLESS:
            return [0]
        order = list(range(size))
        shuffler = random.Random(f"{self._seed}/{source}")
        shuffler.shuffle(order)
        return order

    def _source_name(self, source: int, index: int) -> str | None:
        """Return the ``source`` of a row; None of an unusable row, which is reported when it is drawn."""
        try:
            return self._sources[source][index].source
        except RowError:
            return None

    def _next_index(self, source: int) -> int:
        """Return the index of the next row of a source."""
        taken = self._taken[source]
        size = len(self._sources[source])
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
        return {
            "seed": self._seed,
            "sizes": [len(source) for source in self._sources],
            "drawn": self._drawn,
            "taken": list(self._taken),
            "excluded": self.excluded,
        }

    def load(self, state: StreamState) -> None:
        """Go to a position.

        Raises:
            ConfigError: the position is that of a stream with another seed, or other sources.
        """
        sizes = [len(source) for source in self._sources]
        comparisons = (
            ("seed", state["seed"], self._seed),
            ("sizes", state["sizes"], sizes),
        )
        # Another seed or another file has its rows in another order: the position would mean other rows.
        for key, stored, current in comparisons:
            if stored != current:
                raise ConfigError(
                    f"data.sources: the checkpoint was written with {key} {stored}, this run has {current}; "
                    "use the same seed and sources, or another run.dir"
                )
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
    sources = [(open_training_source(source, validation), source.weight) for source in config.sources]
    return RowStream(sources, seed, exclude, config, skipped)
