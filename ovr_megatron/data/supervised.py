"""Open the packs of supervised training, from a tokenised set or from rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ovr_megatron.config import ColdStartConfig, ConfigError, DataConfig, ValidationConfig
from ovr_megatron.data.best_fit import plan_packs
from ovr_megatron.data.chats import fitting_lengths
from ovr_megatron.data.epochs import EpochStream
from ovr_megatron.data.fingerprints import read_fingerprints
from ovr_megatron.data.held_out import hold_out, open_training_source
from ovr_megatron.data.pack_stream import PackStream
from ovr_megatron.data.packing import Pack, blank_pack, count_replies, pack
from ovr_megatron.data.processing import Processor, TooLongError
from ovr_megatron.data.row_set import RowSet
from ovr_megatron.data.schema import Row
from ovr_megatron.data.skipped import SkippedRows, skipped_rows
from ovr_megatron.data.stream import open_stream
from ovr_megatron.data.tokenised import TokenisedSet
from ovr_megatron.data.work import RowWork, attention_work
from ovr_megatron.runtime.balance import balance
from ovr_megatron.runtime.distributed import World


class StepPacks(Protocol):
    """One replica's packs, step by step.

    Attributes:
        dropped: Samples left out so far.
        fill: Share of the last step's pack space that tokens took.
        replies: Assistant messages of the last step's documents, and how many of them it learns.
    """

    dropped: int
    fill: float
    replies: tuple[int, int]

    def __next__(self) -> list[Pack]:
        """Return the packs of the next step."""


class SupervisedPacks(StepPacks, Protocol):
    """Packs with a position that is JSON."""

    def state(self) -> Mapping[str, Any]:
        """Return the position."""

    def load(self, state: Any, /) -> None:
        """Go to a position."""


def open_packs(
    config: ColdStartConfig,
    processor: Processor,
    world: World,
    work: RowWork = attention_work,
) -> tuple[SupervisedPacks, int]:
    """Open ``data.tokenised`` or ``data.sources``, whichever is given.  A collective where rows are measured.

    ``work`` is that of a row of ``data.sources``, by which packs are shared among the replicas.

    Returns:
        The packs of this process's replica, and the number of steps: ``steps``, or those of ``epochs``.

    Raises:
        ConfigError: neither is given, or ``packs_per_step`` cannot be shared by the replicas.
        RowError: a source or the set cannot be read.
    """
    data = config.data
    seed = config.run.seed
    replica = (world.dp_rank, world.dp_size)
    if world.is_main:
        processor.log_template()
    skipped = skipped_rows(data, Path(config.run.dir), world.is_main)
    if not has_data(data):
        raise missing_data()
    if data.tokenised or not config.steps:
        samples: TokenisedSet | RowSet
        held_out = None
        if data.tokenised:
            samples = TokenisedSet(data.tokenised, processor)
            held_out = held_out_samples(samples, config.validation)
        else:
            samples = measure_rows(config, processor, world, skipped, work)
        positions = processor.shape.max_positions
        epochs = EpochStream(
            samples,
            data,
            config.packs_per_step,
            seed,
            *replica,
            positions,
            skipped,
            held_out,
        )
        return epochs, config.steps or epochs.steps(config.epochs)
    rows = open_stream(data, seed, skipped, config.validation)
    stream = PackStream(
        rows,
        processor,
        data.pack_tokens,
        config.packs_per_step,
        *replica,
        skipped,
        work,
    )
    return stream, config.steps


def measure_rows(
    config: ColdStartConfig,
    processor: Processor,
    world: World,
    skipped: SkippedRows | None,
    work: RowWork,
) -> RowSet:
    """Measure the training rows of ``data.sources``, without those that are held out.  A collective.

    Raises:
        ConfigError: a source has no end, or no row can be used.
        RowError: a source or a row cannot be used.
    """
    data = config.data
    sources = [(source, open_training_source(source, config.validation)) for source in data.sources]
    exclude: frozenset[str] = frozenset()
    if data.exclude:
        exclude = read_fingerprints(Path(data.exclude))
    return RowSet(sources, processor, world, exclude, skipped, work=work)


def held_out_samples(tokenised: TokenisedSet, validation: ValidationConfig) -> np.ndarray | None:
    """Return bool[N], the samples of a tokenised set that are held out; None if none are.

    Raises:
        ConfigError: of a source no sample would be left for training or for validation.
    """
    if not validation.holds_out:
        return None
    held_out = np.zeros(len(tokenised), bool)
    for number, source in enumerate(tokenised.manifest.sources):
        indices = np.flatnonzero(tokenised.sources == number)
        held_out[indices] = hold_out(source.path, len(indices), validation)
    return held_out


def has_data(data: DataConfig) -> bool:
    """Return whether the settings name any data."""
    return bool(data.sources or data.tokenised)


def missing_data() -> ConfigError:
    """Return the error of settings that name no data."""
    return ConfigError(
        "data.sources and data.tokenised are empty: give rows, for example 'data.sources=[{path: rows.jsonl}]', or "
        "data.tokenised=DIR that ovr tokenise wrote"
    )


class ChatPacks:
    """One replica's packs of the chats of a single step, which a program passes; the attributes of `StepPacks`.

    All chats are learned in the step.  Every rank passes the same ones, and so makes the same plan.
    """

    def __init__(self, rows: Sequence[Row], processor: Processor, pack_tokens: int, dp_rank: int, dp_size: int) -> None:
        """Set up; nothing is tokenised yet."""
        self.dropped = 0
        self.fill = 0.0
        self.replies = (0, 0)
        self._rows = rows
        self._processor = processor
        self._pack_tokens = pack_tokens
        self._replica = (dp_rank, dp_size)

    def __next__(self) -> list[Pack]:
        """Return the packs.

        Raises:
            RowError: a row cannot be used, or is longer than a prompt or a pack may be.
        """
        lengths = fitting_lengths(self._processor, self._rows, generation=False)
        for row, length in zip(self._rows, lengths, strict=True):
            if length > self._pack_tokens:
                problem = f"the row takes {length} tokens, more than data.pack_tokens={self._pack_tokens}"
                raise TooLongError(row.where, "messages", problem, "shorten the row or raise the limit")
        plan = plan_packs(lengths, self._pack_tokens)
        dp_rank, dp_size = self._replica
        work = [attention_work(row, length) for row, length in zip(self._rows, lengths, strict=True)]
        costs = [sum(work[i] for i in members) for members in plan]
        packs = []
        for index in balance(costs, dp_size, equal_counts=True)[dp_rank]:
            rows = [self._rows[i] for i in plan[index]]
            packs.append(pack(self._processor.encode(rows, generation=False)))
        most_packs = -(-len(plan) // dp_size)
        # As many on every replica: some settings (FP8 with delayed scaling) synchronise all ranks after each pack.
        packs += [blank_pack()] * (most_packs - len(packs))
        self.fill = sum(lengths) / (most_packs * dp_size * self._pack_tokens)
        self.replies = count_replies(self._rows, self._processor.config.learn)
        return packs
