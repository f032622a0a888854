"""Where documents (or attention windows) begin and end in a pack, and how to batch them for attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

# A group of documents is attended as one padded batch; a document joins a group only while it is at least
# this share of the group's longest, so at most a third of a batch is padding.
_MIN_FILL = 0.67
# Documents of a group together hold at most this many tokens: beyond, batching saves nothing.
_GROUP_TOKENS = 16384


@dataclass
class Group:
    """Documents attended together: ``index`` [B, L] are their rows in the pack, padded with row 0."""

    index: Tensor
    whole: bool  # the group is the whole pack in order, so gathering is a reshape


@dataclass
class Segments(PackedSeqParams):
    """`PackedSeqParams` of a pack plus the grouping that attention without Transformer Engine uses.

    Attributes:
        groups: documents batched by length.
        inverse: [T], for each row of the pack its row in the concatenated outputs of the groups.
    """

    groups: list[Group] = field(default_factory=list)
    inverse: Tensor | None = None

    @classmethod
    def build(cls, cu_seqlens: Tensor, exact: bool) -> Segments:
        """Group the segments of ``cu_seqlens`` [D + 1].

        Args:
            cu_seqlens: int32 boundaries, first 0, last T.
            exact: only group segments of equal length (attention without a causal mask would see padding).
        """
        bounds = cu_seqlens.tolist()
        lengths = [end - start for start, end in pairwise(bounds)]
        longest = max(lengths, default=0)
        segments = cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        device = cu_seqlens.device
        if len(set(lengths)) == 1:
            index = torch.arange(bounds[-1], device=device).view(len(lengths), longest)
            segments.groups = [Group(index, whole=True)]
            return segments
        inverse = torch.empty(bounds[-1], dtype=torch.int64)
        offset = 0
        for members in _group_by_length(lengths, exact):
            width = lengths[members[0]]
            starts = torch.tensor([bounds[i] for i in members])[:, None]
            sizes = torch.tensor([lengths[i] for i in members])[:, None]
            columns = torch.arange(width)[None]
            inside = columns < sizes
            index = torch.where(inside, starts + columns, 0)
            slots = torch.arange(offset, offset + index.numel()).view_as(index)
            inverse[index[inside]] = slots[inside]
            offset += index.numel()
            segments.groups.append(Group(index.to(device), whole=False))
        segments.inverse = inverse.to(device)
        return segments


def _group_by_length(lengths: list[int], exact: bool) -> list[list[int]]:
    """Indices of ``lengths`` in groups of like length, longest first within a group."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    for i in order:
        if groups:
            longest = lengths[groups[-1][0]]
            alike = lengths[i] == longest if exact else lengths[i] >= _MIN_FILL * longest
            if alike and (len(groups[-1]) + 1) * longest <= _GROUP_TOKENS:
                groups[-1].append(i)
                continue
        groups.append([i])
    return groups
