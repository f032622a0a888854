"""Where documents (or attention windows) begin and end in a pack, and how to batch them for attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from ovr_megatron.model.context import gathered_rows
from ovr_megatron.runtime.device import send

# A group of documents is attended as one padded batch; a document joins a group only while it is at least
# this share of the group's longest, so at most a third of a batch is padding.
_MIN_FILL = 0.67
# Documents of a group together hold at most this many tokens: beyond, batching saves nothing.
_GROUP_TOKENS = 16384


@dataclass
class Group:
    """Rows attended together: ``queries`` [B, L] among this rank's rows, ``keys`` [B, K] among all ranks' rows.

    The last query sees all keys; under a causal mask the one before it all but the last, and so on.  Shorter
    documents are padded with row 0.
    """

    queries: Tensor
    keys: Tensor
    whole: bool = False  # the group is the whole pack in order, so gathering is a reshape


@dataclass(frozen=True)
class Grouping:
    """How attention without Transformer Engine goes through a pack.

    Attributes:
        groups: documents batched by length.
        inverse: [T], for each row of this rank its row in the concatenated outputs of the groups; None: the same.
    """

    groups: list[Group]
    inverse: Tensor | None


@dataclass
class Segments(PackedSeqParams):
    """`PackedSeqParams` of a pack, and what `grouping` needs.

    Attributes:
        pad_between_seqs: whether documents end before their rows do; Transformer Engine would ask the device.
        starts: [D + 1], as `build` was given them.
        exact: likewise.
        share: size of the context-parallel group and this rank in it.
    """

    pad_between_seqs: bool = False
    starts: Sequence[int] = ()
    exact: bool = False
    share: tuple[int, int] = (1, 0)

    @classmethod
    def build(
        cls,
        bounds: Tensor,
        exact: bool,
        device: torch.device,
        cp_group: dist.ProcessGroup | None = None,
        lengths: Tensor | None = None,
    ) -> Segments:
        """Describe the segments of a pack.

        Without context parallelism a document reaches to the end of its rows, alignment tail included.  Under the
        causal mask its own tokens never see the tail, and no attention kernel has rows of which it computes nothing:
        of those FlashAttention leaves the gradient uninitialised.

        Under context parallelism Transformer Engine is told of every tail, that of the last document included.  Its
        ring attention divides lengths by the ranks unless ``pad_between_seqs`` is set, which is only right where the
        real lengths fill the rows (``context_parallel.py``, ``cp_p2p_fwd_prepare_qkv``, up to 2.20).

        Args:
            bounds: int32 [D + 1] on the host, first 0, last T.
            exact: only group segments of equal length (attention without a causal mask would see padding).
            device: where attention runs.
            cp_group: context-parallel group; each rank holds the rows of `context.rank_rows`.
            lengths: int32 [D + 1] on the host, cumulated lengths without alignment tails, where there are any; the mask
                must be causal.
        """
        assert lengths is None or not exact, "without a causal mask, tokens would see the tails"
        starts = bounds.tolist()
        longest = max((end - start for start, end in pairwise(starts)), default=0)
        share = (1, 0) if cp_group is None else (cp_group.size(), cp_group.rank())
        rows = send(bounds, device)
        has_tails = share[0] > 1 and lengths is not None and lengths.tolist() != starts
        real = send(lengths, device) if has_tails and lengths is not None else rows
        return cls(
            qkv_format="thd",
            cu_seqlens_q=real,
            cu_seqlens_kv=real,
            cu_seqlens_q_padded=rows if has_tails else None,
            cu_seqlens_kv_padded=rows if has_tails else None,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            pad_between_seqs=has_tails,
            starts=starts,
            exact=exact,
            share=share,
        )

    @cached_property
    def grouping(self) -> Grouping:
        """Made when it is first asked for: Transformer Engine needs none."""
        starts, device = self.starts, self.cu_seqlens_q.device
        widths = [end - start for start, end in pairwise(starts)]
        if self.share[0] > 1:
            groups = _chunk_groups(starts, widths, *self.share)
        elif len(set(widths)) == 1:
            index = send(torch.arange(starts[-1]).view(len(widths), widths[0]), device)
            return Grouping([Group(index, index, whole=True)], None)
        else:
            groups = [_document_group(starts, widths, members) for members in _group_by_length(widths, self.exact)]
        inverse = send(_inverse(groups), device)
        return Grouping([Group(send(g.queries, device), send(g.keys, device), g.whole) for g in groups], inverse)


def _document_group(starts: Sequence[int], widths: Sequence[int], members: Sequence[int]) -> Group:
    """Whole documents; the first of ``members`` is the longest.  A negative row is padding."""
    columns = torch.arange(widths[members[0]])[None]
    first = torch.tensor([starts[i] for i in members])[:, None]
    sizes = torch.tensor([widths[i] for i in members])[:, None]
    index = torch.where(columns < sizes, first + columns, -1)
    return Group(index, index.clamp(min=0))


def _chunk_groups(starts: Sequence[int], widths: Sequence[int], cp: int, rank: int) -> list[Group]:
    """The two chunks that ``rank`` holds of each document, with all keys up to their end."""
    place = gathered_rows(starts, cp)
    groups = []
    for members in _group_by_length(widths, exact=True):
        chunk = widths[members[0]] // (2 * cp)
        for half, number in enumerate((rank, 2 * cp - 1 - rank)):
            here = torch.tensor([starts[i] // cp + half * chunk for i in members])[:, None]
            there = torch.tensor([starts[i] for i in members])[:, None]
            keys = place[there + torch.arange((number + 1) * chunk)]
            groups.append(Group(here + torch.arange(chunk), keys))
    return groups


def _inverse(groups: Sequence[Group]) -> Tensor:
    """For each query row, where its output lies; padding (negative rows) is set to row 0."""
    rows = torch.cat([group.queries.flatten() for group in groups])
    inverse = torch.empty(int(rows.max()) + 1, dtype=torch.int64)
    slots = (rows >= 0).nonzero()[:, 0]
    inverse[rows[slots]] = slots
    for group in groups:
        group.queries.clamp_(min=0)
    return inverse


def _group_by_length(lengths: Sequence[int], exact: bool) -> list[list[int]]:
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
