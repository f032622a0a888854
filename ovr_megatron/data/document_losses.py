"""Each document's own loss in a step: which source learns what, and which documents make a loss stand out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ovr_megatron.data.packing import Origin, Pack
from ovr_megatron.runtime.device import send


@dataclass(frozen=True)
class DocumentLoss:
    """Sum of the losses of a document's targets; ``place`` tells apart the documents of a step."""

    place: tuple[int, int, int]
    origin: Origin
    total: float
    targets: int

    @property
    def mean(self) -> float:
        """Loss of a target."""
        return self.total / max(self.targets, 1)


class DocumentLosses:
    """Collects the losses of one step on one rank; ``replica`` is its data-parallel rank."""

    def __init__(self, replica: int):
        self.replica = replica
        self.sums: list[tuple[tuple[Origin, ...], Tensor]] = []

    def add(self, pack: Pack, rows: Tensor, losses: Tensor) -> None:
        """Count the ``losses`` [n] of the targets predicted at ``rows`` [n], on the host, of the pack."""
        documents = send(torch.searchsorted(pack.bounds[1:].to(rows.dtype), rows, right=True), losses.device)
        sums = torch.zeros(2, len(pack.cu_seqlens) - 1, dtype=torch.float64, device=losses.device)
        values = torch.stack([losses.detach().double(), torch.ones_like(losses, dtype=torch.float64)])
        self.sums.append((pack.origins, sums.index_add_(1, documents, values)))

    def documents(self) -> tuple[DocumentLoss, ...]:
        """What this rank saw of each document that has a name."""
        return tuple(
            DocumentLoss((self.replica, number, index), origin, total, int(targets))
            for number, (origins, sums) in enumerate(self.sums)
            for index, (origin, total, targets) in enumerate(zip(origins, *sums.tolist(), strict=False))
        )


def merged(documents: Iterable[DocumentLoss]) -> list[DocumentLoss]:
    """Documents of which several ranks hold parts (context parallelism), put together; those with targets only."""
    whole: dict[tuple[int, int, int], DocumentLoss] = {}
    for part in documents:
        known = whole.get(part.place)
        whole[part.place] = (
            replace(part, total=known.total + part.total, targets=known.targets + part.targets) if known else part
        )
    return [document for document in whole.values() if document.targets]


def by_source(documents: Sequence[DocumentLoss]) -> dict[str, float]:
    """Mean loss of a target in each source."""
    sums: dict[str, list[float]] = {}
    for document in documents:
        entry = sums.setdefault(document.origin.source or "unnamed", [0.0, 0.0])
        entry[0] += document.total
        entry[1] += document.targets
    return {source: total / count for source, (total, count) in sorted(sums.items())}


def worst(documents: Sequence[DocumentLoss], count: int) -> list[dict[str, Any]]:
    """The ``count`` documents of the highest loss, as JSON; those that are not a number first."""
    ordered = sorted(documents, key=lambda document: (document.mean == document.mean, -document.mean))
    return [asdict(d.origin) | {"loss": d.mean, "targets": d.targets} for d in ordered[:count]]
