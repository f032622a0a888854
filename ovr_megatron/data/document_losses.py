"""Losses of the documents of a step: the mean loss of each source, and the documents that make a loss an outlier."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from torch import Tensor

from ovr_megatron.data.packing import Origin, Pack
from ovr_megatron.runtime.device import send

DocumentKey = tuple[int, int, int]  # data-parallel rank, index of the pack in the step, index in the pack


@dataclass(frozen=True)
class DocumentLoss:
    """The sum of the losses of a document's targets.

    Attributes:
        key: Unique in a step.
        origin: The row of the document.
        total: Sum of the losses.
        targets: Number of targets.
    """

    key: DocumentKey
    origin: Origin
    total: float
    targets: int

    @property
    def mean(self) -> float:
        """Mean loss of a target."""
        return self.total / max(self.targets, 1)


class DocumentLosses:
    """Collects the losses of one step on one rank; ``replica`` is its data-parallel rank."""

    def __init__(self, replica: int):
        self.replica = replica
        # Of each pack, its origins and float64[2, D]: sums of losses, and numbers of targets.
        self._origins: list[tuple[Origin, ...]] = []
        self._sums: list[Tensor] = []

    def add(self, pack: Pack, rows: Tensor, losses: Tensor) -> None:
        """Add the losses of a pack.

        Args:
            pack: The pack, on the host.
            rows: int[n], the rows that predict a target, on the host.
            losses: [n], the losses there, on any device.
        """
        documents = send(pack.document_of(rows), losses.device)
        # In float64: a document of 100,000 targets must not lose the small losses.  The sums stay on the device.
        count = len(pack.cu_seqlens) - 1
        sums = torch.zeros(2, count, dtype=torch.float64, device=losses.device)
        ones = torch.ones_like(losses, dtype=torch.float64)
        values = torch.stack([losses.detach().double(), ones])
        sums.index_add_(1, documents, values)
        self._origins.append(pack.origins)
        self._sums.append(sums)

    def documents(self) -> tuple[DocumentLoss, ...]:
        """Return this rank's part of each document that has an origin; it waits for the device."""
        documents = []
        for pack_index, origins in enumerate(self._origins):
            totals, targets = self._sums[pack_index].tolist()
            # By the origins: a pack of padding has documents and no origins.
            for index, origin in enumerate(origins):
                key = (self.replica, pack_index, index)
                count = int(targets[index])
                documents.append(DocumentLoss(key, origin, totals[index], count))
        return tuple(documents)


def merge_parts(parts: Iterable[DocumentLoss]) -> list[DocumentLoss]:
    """Add up the parts of each document over the ranks (context parallelism) and return documents with targets."""
    documents: dict[DocumentKey, DocumentLoss] = {}
    for part in parts:
        if earlier := documents.get(part.key):
            # Ranks of a context-parallel group have the losses of their own rows of it.
            total = earlier.total + part.total
            targets = earlier.targets + part.targets
            part = replace(part, total=total, targets=targets)
        documents[part.key] = part
    return [document for document in documents.values() if document.targets]


def by_source(documents: Sequence[DocumentLoss]) -> dict[str, float]:
    """Return the mean loss of a target in each source."""
    sums: dict[str, list[float]] = {}
    for document in documents:
        source = document.origin.source or "unnamed"
        entry = sums.setdefault(source, [0.0, 0.0])
        entry[0] += document.total
        entry[1] += document.targets
    means = {}
    for source, (total, count) in sorted(sums.items()):
        means[source] = total / count
    return means


class DocumentJson(TypedDict):
    """A document in the record of a spike: its row, the mean loss of a target, and its targets."""

    where: str
    id: str
    source: str
    loss: float
    targets: int


def worst(documents: Sequence[DocumentLoss], count: int) -> list[DocumentJson]:
    """Return the ``count`` documents of the highest loss as JSON objects; a loss that is not a number comes first."""

    def severity(document: DocumentLoss) -> tuple[bool, float]:
        loss = document.mean
        # False sorts before true.
        return not math.isnan(loss), -loss

    ordered = sorted(documents, key=severity)
    records: list[DocumentJson] = []
    for document in ordered[:count]:
        origin = document.origin
        records.append(
            {
                "where": origin.where,
                "id": origin.id,
                "source": origin.source,
                "loss": document.mean,
                "targets": document.targets,
            }
        )
    return records
