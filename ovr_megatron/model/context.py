"""Context parallelism over packs: which rows of a pack each rank holds.

Every document is cut into 2 x cp chunks; rank r holds chunk r and chunk 2 cp - 1 - r, so that each rank attends to
as much as any other under the causal mask.  It is the order that Transformer Engine expects.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def rank_rows(bounds: Sequence[int], cp: int, rank: int) -> Tensor:
    """The rows of the pack that context-parallel ``rank`` of ``cp`` holds, in its order: int64 [T / cp].

    It is the one index for tokens, positions, labels, features and everything that lies beside them.

    Args:
        bounds: [D + 1], where documents begin; every document's rows are a multiple of 2 cp.
        cp: context-parallel size.
        rank: from 0.
    """
    if cp == 1:
        return torch.arange(bounds[-1])
    parts = []
    for start, end in pairwise(bounds):
        chunk = (end - start) // (2 * cp)
        for number in (rank, 2 * cp - 1 - rank):
            parts.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
    return torch.cat(parts)


def gathered_rows(bounds: Sequence[int], cp: int) -> Tensor:
    """For each row of the pack, where it lies when the ranks' rows are put one rank after the other: int64 [T]."""
    order = torch.cat([rank_rows(bounds, cp, rank) for rank in range(cp)])
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return place


def share_images(patches: Sequence[int], ranks: int) -> list[list[int]]:
    """Images (or videos) dealt to ``ranks`` so that their patches are balanced: largest first to the least loaded.

    Returns:
        For each rank the numbers of its images, rising.
    """
    load = [0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for image in sorted(range(len(patches)), key=lambda i: -patches[i]):
        rank = load.index(min(load))
        load[rank] += patches[image]
        shares[rank].append(image)
    return [sorted(share) for share in shares]
