"""Pack an endless stream of rows, step by step, from a position that resumes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypedDict

from ovr_megatron.config import ConfigError
from ovr_megatron.data.best_fit import plan_packs
from ovr_megatron.data.packing import Pack, count_replies, pack
from ovr_megatron.data.processing import Processor, TooLongError
from ovr_megatron.data.schema import Row, RowError
from ovr_megatron.data.skipped import SkippedRows, lengths_or_errors
from ovr_megatron.data.work import RowWork, attention_work
from ovr_megatron.runtime.balance import balance

CHUNK = 64  # rows that are drawn and tokenised together
BARREN = 16  # chunks without one row that fits, after which the stream gives up
LOOKAHEAD = 2  # packs of waiting rows beyond those of a step, so that best fit has a choice


class PackingState(TypedDict):
    """Position of `PackStream`, as JSON: that of the rows, the rows drawn since, and those of them that still wait."""

    rows: Any
    drawn: int
    waiting: list[int]
    dropped: int


class ResumableRows(Protocol):
    """An endless stream of rows whose position is JSON."""

    def __next__(self) -> Row:
        """Draw a row."""

    def state(self) -> Mapping[str, Any]:
        """Return the position."""

    def load(self, state: Any, /) -> None:
        """Go to a position."""


@dataclass(frozen=True)
class _WaitingRow:
    """A row of ``length`` tokens that is in no pack yet; ``draw`` counts the rows that were drawn before it."""

    draw: int
    row: Row
    length: int
    work: float


_Snapshot = tuple[int, Mapping[str, Any]]  # rows drawn, and the position of the rows then


class PackStream:
    """Supervised packs, step by step, from an endless stream of rows.

    Every rank draws and measures every row and so makes the same plan; it processes the pixels of its own
    packs only.  Rows that have waited longest are packed first.  A row over ``data.max_prompt_tokens`` or
    ``pack_tokens`` is dropped and counted in ``dropped``; so is an unusable row where there is a list for it.

    Attributes:
        dropped: Rows dropped so far.
        fill: Share of the last step's pack space that tokens took.
        replies: Assistant messages of the last step's rows, and how many of them it learns.
    """

    def __init__(
        self,
        stream: ResumableRows,
        processor: Processor,
        pack_tokens: int,
        packs_per_step: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        skipped: SkippedRows | None = None,
        work: RowWork = attention_work,
    ) -> None:
        """Set up; nothing is drawn yet.

        Args:
            stream: Rows.
            processor: Of the model.
            pack_tokens: Tokens of a pack.
            packs_per_step: Packs of a step over all replicas.
            dp_rank: This replica.
            dp_size: Number of replicas.
            skipped: Lists rows that are left out; None stops at a bad row.
            work: The work of a row, by which packs are shared among the replicas.

        Raises:
            ConfigError: ``packs_per_step`` is not a multiple of ``dp_size``.
        """
        if packs_per_step % dp_size:
            raise ConfigError(
                f"packs_per_step={packs_per_step} cannot be shared by {dp_size} data-parallel replicas; "
                f"make it a multiple of {dp_size}"
            )
        self.pack_tokens = pack_tokens
        self.packs_per_step = packs_per_step
        self.dropped = 0
        self.fill = 0.0
        self.replies = (0, 0)
        self._stream = stream
        self._processor = processor
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._skipped = skipped
        self._work = work
        self._waiting: list[_WaitingRow] = []
        self._drawn = 0  # rows
        self._barren = 0  # chunks since the last row that fits
        self._snapshots: list[_Snapshot] = []  # before each chunk

    def __iter__(self) -> Iterator[list[Pack]]:
        return self

    def __next__(self) -> list[Pack]:
        """Return this rank's packs of the next step.

        Raises:
            RowError: a row cannot be used, or very many rows in a row are too long.
        """
        needed_tokens = (self.packs_per_step + LOOKAHEAD) * self.pack_tokens
        while sum(item.length for item in self._waiting) < needed_tokens:
            self._draw()
        lengths = [item.length for item in self._waiting]
        plan = plan_packs(lengths, self.pack_tokens)[: self.packs_per_step]
        planned = set(itertools.chain.from_iterable(plan))
        space = self.packs_per_step * self.pack_tokens
        self.fill = sum(lengths[i] for i in planned) / space
        # Every rank has the same lengths and so computes the same plan and shares, without a collective.
        work = [item.work for item in self._waiting]
        costs = [sum(work[i] for i in members) for members in plan]
        shares = balance(costs, self._dp_size, equal_counts=True)
        packs = []
        for index in shares[self._dp_rank]:
            rows = [self._waiting[i].row for i in plan[index]]
            samples = self._processor.encode(rows, generation=False)
            packs.append(pack(samples))
        planned_rows = []
        waiting = []
        for i, item in enumerate(self._waiting):
            if i in planned:
                planned_rows.append(item.row)
            else:
                waiting.append(item)
        self.replies = count_replies(planned_rows, self._processor.config.learn)
        self._waiting = waiting
        self._forget_snapshots()
        return packs

    def state(self) -> PackingState:
        """Return the position as JSON: a position of the rows, and which of the rows drawn since still wait."""
        if self._snapshots:
            start, rows = self._snapshots[0]
        else:
            start = self._drawn
            rows = self._stream.state()
        # Relative to the snapshot: a resumed run counts its draws from there.
        return {
            "rows": copy.deepcopy(rows),
            "drawn": self._drawn - start,
            "waiting": [item.draw - start for item in self._waiting],
            "dropped": self.dropped,
        }

    def load(self, state: PackingState) -> None:
        """Go to a position: draw the rows since it again, and keep those that still waited."""
        self._stream.load(copy.deepcopy(state["rows"]))
        self._waiting = []
        self._snapshots = []
        self._drawn = 0
        while self._drawn < state["drawn"]:
            self._draw(keep=set(state["waiting"]))
        self.dropped = state["dropped"]  # last: drawing again counts rows that were counted before

    def _draw(self, keep: set[int] | None = None) -> None:
        """Draw a chunk of rows and append those that fit to the waiting rows; with ``keep``, only these draws."""
        # Before the chunk: a resumed run draws the rows that still wait again from here.
        position = copy.deepcopy(self._stream.state())
        self._snapshots.append((self._drawn, position))
        drawn = []
        for draw in range(self._drawn, self._drawn + CHUNK):
            row = next(self._stream)
            if keep is None or draw in keep:
                drawn.append((draw, row))
        self._drawn += CHUNK
        lengths = self._measure([row for _, row in drawn])
        fitting = []
        for (draw, row), length in zip(drawn, lengths, strict=True):
            if isinstance(length, int):
                fitting.append(_WaitingRow(draw, row, length, self._work(row, length)))
        self._waiting += fitting
        self.dropped += len(drawn) - len(fitting)
        self._barren = 0 if fitting else self._barren + 1
        # While a position is loaded, all rows of a chunk may be in packs already.
        if self._barren == BARREN and drawn:
            _, last_row = drawn[-1]
            self._give_up(last_row, lengths[-1])

    def _measure(self, rows: list[Row]) -> list[int | RowError]:
        """Return the tokens of each row, or the error that leaves it out."""
        lengths = lengths_or_errors(self._processor, rows, generation=False, skipped=self._skipped)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            if isinstance(length, int) and length > self.pack_tokens:
                problem = f"has {length} tokens, more than data.pack_tokens={self.pack_tokens}"
                error = TooLongError(row.where, "messages", problem, "raise data.pack_tokens, or leave the row out")
                lengths[i] = error
                if self._skipped is not None:
                    self._skipped.add(error)
        return lengths

    def _give_up(self, row: Row, length: int | RowError) -> NoReturn:
        assert isinstance(length, RowError)
        remedy = f"raise data.pack_tokens={self.pack_tokens} or data.max_prompt_tokens, or correct the rows"
        problem = f"{length.problem}; so it is with {BARREN * CHUNK} rows in a row"
        raise TooLongError(row.where, "messages", problem, remedy)

    def _forget_snapshots(self) -> None:
        """Forget the snapshots before the one from which the oldest waiting row can be drawn again."""
        oldest = self._drawn
        if self._waiting:
            oldest = self._waiting[0].draw
        while len(self._snapshots) > 1:
            next_start, _ = self._snapshots[1]
            if next_start > oldest:
                break
            self._snapshots.pop(0)
