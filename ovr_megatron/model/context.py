"""Context parallelism over packs: the rows of a pack that each rank holds.

Every document is cut into 2 x cp chunks; rank r holds chunk r and chunk 2 cp - 1 - r, so that each rank attends to
as much as any other under the causal mask.  It is the order that Transformer Engine expects.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ovr_megatron.runtime.balance import balance


def rank_rows(bounds: Sequence[int], cp: int, rank: int) -> Tensor:
    """Return the rows of the pack that context-parallel ``rank`` of ``cp`` holds, in its order: int64 [T / cp].

    Tokens, positions, labels, features and extras are all cut by this index.

    Args:
        bounds: [D + 1], where documents begin; every document's rows are a multiple of 2 cp.
        cp: context-parallel size.
        rank: from 0.
    """
    if cp == 1:
        return torch.arange(bounds[-1])
    chunk_count = 2 * cp
    rank_chunks = (rank, chunk_count - 1 - rank)
    rows = []
    for start, end in pairwise(bounds):
        size = (end - start) // chunk_count
        for chunk in rank_chunks:
            chunk_start = start + chunk * size
            chunk_rows = torch.arange(chunk_start, chunk_start + size)
            rows.append(chunk_rows)
    return torch.cat(rows)


def gathered_rows(bounds: Sequence[int], cp: int) -> Tensor:
    """Return for each row of the pack its row in the ranks' rows, gathered in the order of ranks: int64 [T]."""
    rows_by_rank = [rank_rows(bounds, cp, rank) for rank in range(cp)]
    pack_rows = torch.cat(rows_by_rank)
    gathered = torch.empty_like(pack_rows)
    gathered[pack_rows] = torch.arange(len(pack_rows))
    return gathered


def share_images(patches: Sequence[int], ranks: int) -> list[list[int]]:
    """Balance images (or videos) over ``ranks`` by their ``patches``: largest first to the least loaded rank.

    Returns:
        For each rank the indices of its images, rising.
    """
    shares = balance(patches, ranks)
    return [sorted(share) for share in shares]
