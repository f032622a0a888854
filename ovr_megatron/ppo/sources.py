"""Sources of an iteration's responses, and means over the tokens of each source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ovr_megatron.data.schema import Row
from ovr_megatron.ppo.advantages import Ragged
from ovr_megatron.ppo.batch import Response
from ovr_megatron.runtime.exchange import gather_objects


@dataclass(frozen=True)
class ResponseSources:
    """The source of each response of a rank.

    Attributes:
        names: of the sources of all prompts, sorted, the same on all ranks; none where there is one source, whose
            statistics are those of all responses.
        indices: of each response's source in ``names``; none without names.
    """

    names: tuple[str, ...] = ()
    indices: tuple[int, ...] = ()

    def token_indices(self, lengths: Sequence[int]) -> Ragged:
        """Return the index of each response's source for each of its ``lengths[i]`` tokens, float64 [n]."""
        arrays = []
        for index, length in zip(self.indices, lengths, strict=True):
            arrays.append(np.full(length, float(index)))
        return arrays

    def of(self, arrays: Ragged, index: int) -> Ragged:
        """Return those of ``arrays``, one for each response, whose response is of source ``index``."""
        selected = []
        for array, source in zip(arrays, self.indices, strict=True):
            if source == index:
                selected.append(array)
        return selected


def source_names(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the names of the sources of ``rows``, sorted; none where there is only one."""
    # Sorted: an index means the same source on all ranks.
    names = sorted({row.source for row in rows})
    return tuple(names) if len(names) > 1 else ()


def response_sources(rows: Sequence[Row], responses: Sequence[Response]) -> ResponseSources:
    """Return the sources of ``responses``, whose prompts are ``rows``, the same on all ranks."""
    names = source_names(rows)
    if not names:
        return ResponseSources()
    indices = [names.index(rows[response.prompt].source) for response in responses]
    return ResponseSources(names, tuple(indices))


class SourceMeans:
    """Means of values of the tokens of some packs, for each source.

    All sums stay on the device of the values, which is never waited for, until `means`.

    Args:
        names: of the sources, the same on all ranks.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._sums: dict[str, Tensor] = {}  # float64, by source
        self._counts: Tensor | None = None

    def add(self, values: Mapping[str, Tensor], sources: Tensor) -> None:
        """Add values [n] of the tokens of a pack, by name, whose sources have the indices ``sources`` [n]."""
        indices = sources.long()
        zeros = torch.zeros(len(self.names), dtype=torch.float64, device=indices.device)
        ones = torch.ones_like(indices, dtype=torch.float64)
        if self._counts is None:
            self._counts = zeros
        self._counts = self._counts.index_add(0, indices, ones)
        for name, token_values in values.items():
            # In float64: a sum over many packs in float32 would lose the last tokens.
            sums = self._sums.get(name, zeros)
            self._sums[name] = sums.index_add(0, indices, token_values.double())

    def means(self) -> dict[str, dict[str, float]]:
        """Return the mean of each value over all ranks, by source; none of a source without tokens.  A collective.

        Ranks of a tensor-parallel group count the same tokens, all equally often, which changes no mean.  A pipeline
        stage without scores counts none.
        """
        # From here on the device is waited for, once a step.
        local_sums = {name: sums.tolist() for name, sums in self._sums.items()}
        local_counts = [0.0] * len(self.names)
        if self._counts is not None:
            local_counts = self._counts.tolist()
        totals: dict[str, np.ndarray] = {}
        counts = np.zeros(len(self.names))
        for rank_sums, rank_counts in gather_objects((local_sums, local_counts)):
            counts += rank_counts
            for name, sums in rank_sums.items():
                total = totals.setdefault(name, np.zeros(len(self.names)))
                total += np.array(sums)
        means: dict[str, dict[str, float]] = {}
        for i, source in enumerate(self.names):
            count = counts[i]
            if not count:
                continue
            means[source] = {}
            for name, total in totals.items():
                means[source][name] = float(total[i] / count)
        return means
