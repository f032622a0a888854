"""Measure the loss on rows that are not trained: a mean over all of their targets, and over those of each source.

Rows and packs are the same in every layout, and nothing is drawn at random, so that training goes on as without it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch.distributed as dist
from torch import Tensor

from ovr_megatron.config import ColdStartConfig, ConfigError
from ovr_megatron.data.best_fit import plan_packs
from ovr_megatron.data.document_losses import DocumentLoss, DocumentLosses
from ovr_megatron.data.epochs import SampleSet, fits_limits
from ovr_megatron.data.held_out import open_validation_sources
from ovr_megatron.data.packing import Pack, blank_pack, pack
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.row_set import RowSet
from ovr_megatron.data.skipped import SkippedRows
from ovr_megatron.data.supervised import held_out_samples
from ovr_megatron.data.tokenised import TokenisedSet
from ovr_megatron.engine import Engine
from ovr_megatron.runtime.balance import balance
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.logs import get_logger

logger = get_logger(__name__)


class Validation:
    """The validation rows of a run, in packs that are made once.

    Attributes:
        every: Steps between two losses; 0 is after the last step alone.
    """

    def __init__(
        self,
        samples: SampleSet,
        indices: np.ndarray,
        pack_tokens: int,
        packs_per_call: int,
        engine: Engine,
        world: World,
        every: int = 0,
    ) -> None:
        """Pack the samples; nothing is processed yet.

        Args:
            samples: The set.
            indices: int64[n], the samples that are measured.
            pack_tokens: Tokens of a pack.
            packs_per_call: Packs of a replica that are in memory at once.
            engine: The trained model.
            world: This process.
            every: Steps between two losses.
        """
        self.every = every
        self._samples = samples
        self._engine = engine
        self._world = world
        self._packs_per_call = packs_per_call
        lengths = samples.lengths[indices].astype(np.int64)
        plan = plan_packs(lengths.tolist(), pack_tokens)
        costs = [int((lengths[members] ** 2).sum()) for members in plan]
        shares = balance(costs, world.dp_size, equal_counts=True)
        self._packs = [indices[plan[index]] for index in shares[world.dp_rank]]
        # Every replica takes as many packs: with an overlapped parameter gather each call is a collective of them all.
        self._packs_per_replica = max(map(len, shares))

    def due(self, steps_done: int, is_last: bool) -> bool:
        """Return whether the loss is measured after ``steps_done`` steps."""
        return is_last or bool(self.every and steps_done % self.every == 0)

    def losses(self) -> dict[str, float]:
        """Return ``validation/loss``, and that of each source where there are several.  A collective.

        On all ranks but the first the result is empty.
        """
        local = DocumentLosses(self._world.dp_rank)
        for start in range(0, self._packs_per_replica, self._packs_per_call):
            end = min(start + self._packs_per_call, self._packs_per_replica)
            packs = [self._pack(index) for index in range(start, end)]
            for scored_pack, scores in zip(packs, self._engine.scores(packs), strict=True):
                local.add(scored_pack, scores.rows, -cast(Tensor, scores.logprobs))
        # Every rank of a replica has the scores of all of its rows: one of them counts.
        documents: Sequence[DocumentLoss] = ()
        if self._world.layout.leads_replica:
            documents = local.documents()
        parts: list[Sequence[DocumentLoss]] | None = [()] * self._world.size if self._world.is_main else None
        dist.gather_object(documents, parts)
        if parts is None:
            return {}
        return _means(itertools.chain.from_iterable(parts))

    def _pack(self, index: int) -> Pack:
        """Return pack ``index`` of this replica; a blank one where it has fewer than others."""
        if index >= len(self._packs):
            return blank_pack()
        samples = self._samples.samples(self._packs[index])
        return pack(samples)


def open_validation(
    config: ColdStartConfig,
    processor: Processor,
    engine: Engine,
    world: World,
) -> Validation | None:
    """Open and measure the validation rows; None where there are none.  A collective.

    Raises:
        ConfigError: no row is left for training, or for validation.
        RowError: a source or a row cannot be used.
    """
    validation = config.validation
    if not validation.is_on:
        return None
    data = config.data
    samples: SampleSet
    if data.tokenised and validation.holds_out:
        tokenised = TokenisedSet(data.tokenised, processor)
        fits = fits_limits(tokenised, data, processor.shape.max_positions, None)
        indices = np.flatnonzero(fits & held_out_samples(tokenised, validation))
        samples = tokenised
    else:
        skipped = None
        if data.on_error == "skip":
            path = Path(config.run.dir) / "data" / "skipped_validation.jsonl"
            skipped = SkippedRows(path if world.is_main else None)
        title = "validation.sources" if validation.sources else "data.sources"
        sources = open_validation_sources(data, validation)
        samples = RowSet(sources, processor, world, skipped=skipped, title=title)
        indices = np.arange(len(samples))
    if not len(indices):
        raise ConfigError(
            "validation: none of the held-out samples is within the limits; raise validation.share or validation.rows"
        )
    tokens = int(samples.lengths[indices].sum())
    if world.is_main:
        logger.info(f"validation: {len(indices):,} rows, {tokens:,} tokens; {samples.dropped:,} rows are left out")
    packs_per_call = max(1, config.packs_per_step // world.dp_size)
    return Validation(samples, indices, data.pack_tokens, packs_per_call, engine, world, validation.every)


def _means(documents: Iterable[DocumentLoss]) -> dict[str, float]:
    """Return the mean loss of a target over all documents, and over those of each source where there are several."""
    measured = list(documents)
    by_source: dict[str, list[DocumentLoss]] = {}
    for document in measured:
        name = document.origin.source or "unnamed"
        by_source.setdefault(name, []).append(document)
    losses = {"validation/loss": _mean(measured)}
    if len(by_source) > 1:
        for source in sorted(by_source):
            losses[f"validation/loss/source/{source}"] = _mean(by_source[source])
    return losses


def _mean(documents: Sequence[DocumentLoss]) -> float:
    # `fsum` rounds once, so that the order in which the replicas' documents arrive does not matter.
    total = math.fsum(document.total for document in documents)
    targets = sum(document.targets for document in documents)
    return total / max(1, targets)
