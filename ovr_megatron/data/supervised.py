"""Open the packs of supervised training, from a tokenised set or from rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ovr_megatron.config import ColdStartConfig, ConfigError
from ovr_megatron.data.epochs import EpochStream
from ovr_megatron.data.pack_stream import PackStream
from ovr_megatron.data.packing import Pack
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.skipped import skipped_rows
from ovr_megatron.data.stream import open_stream
from ovr_megatron.data.tokenised import TokenisedSet
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.logs import NOTICE, get_logger

logger = get_logger(__name__)


class SupervisedPacks(Protocol):
    """One replica's packs, step by step, with a position that is JSON.

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

    def state(self) -> Mapping[str, Any]:
        """Return the position."""

    def load(self, state: Any, /) -> None:
        """Go to a position."""


def open_packs(
    config: ColdStartConfig,
    processor: Processor,
    world: World,
) -> tuple[SupervisedPacks, int]:
    """Open ``data.tokenised`` or ``data.sources``, whichever is given.

    Returns:
        The packs of this process's replica, and the number of steps: ``steps``, or those of ``epochs``.

    Raises:
        ConfigError: neither is given, or ``packs_per_step`` cannot be shared by the replicas.
        RowError: a source or the set cannot be read.
    """
    data = config.data
    seed = config.run.seed
    replica = (world.dp_rank, world.dp_size)
    if world.is_main and processor.template_notice:
        logger.log(NOTICE, processor.template_notice)
    skipped = skipped_rows(data, Path(config.run.dir), world.is_main)
    if data.tokenised:
        tokenised = TokenisedSet(data.tokenised, processor)
        positions = processor.shape.max_positions
        epochs = EpochStream(
            tokenised,
            data,
            config.packs_per_step,
            seed,
            *replica,
            positions,
            skipped,
        )
        return epochs, config.steps or epochs.steps(config.epochs)
    if not data.sources:
        raise ConfigError(
            "data.sources and data.tokenised are empty: give rows, for example 'data.sources=[{path: rows.jsonl}]', or "
            "data.tokenised=DIR that ovr tokenise wrote"
        )
    rows = open_stream(data, seed, skipped)
    stream = PackStream(
        rows,
        processor,
        data.pack_tokens,
        config.packs_per_step,
        *replica,
        skipped,
    )
    return stream, config.steps
