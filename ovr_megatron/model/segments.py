"""Bounds of documents (or attention windows) in a pack, and their batches for attention without Transformer Engine."""

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
class DocumentGroup:
    """Rows attended together: ``queries`` [B, L] among this rank's rows, ``keys`` [B, K] among all ranks' rows.

    The last query sees all keys; under a causal mask the one before it all but the last, and so on.  Shorter
    documents are padded with row 0.
    """

    queries: Tensor
    keys: Tensor
    is_pack: bool = False  # the group is all rows of the pack in order, so gathering is a reshape


@dataclass(frozen=True)
class Grouping:
    """The batches of attention without Transformer Engine over a pack.

    Attributes:
        groups: documents batched by length.
        inverse: [T], for each row of this rank its row in the concatenated outputs of the groups; None: the same.
    """

    groups: list[DocumentGroup]
    inverse: Tensor | None


@dataclass
class Segments(PackedSeqParams):
    """`PackedSeqParams` of a pack, and the arguments of `grouping`.

    Attributes:
        pad_between_seqs: whether documents end before their rows do; unset, Transformer Engine would ask the device.
        starts: [D + 1], the ``bounds`` of `build`.
        exact: as for `build`.
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
        causal mask its tokens never see the tail.  Rows outside of all documents would be worse: FlashAttention
        leaves their gradient uninitialised.

        Under context parallelism Transformer Engine gets the length of every tail, the last document's included.  Its
        ring attention divides lengths by the ranks unless ``pad_between_seqs`` is set, which is only right where the
        real lengths fill the rows (``context_parallel.py``, ``cp_p2p_fwd_prepare_qkv``, up to 2.20).

        Args:
            bounds: int32 [D + 1] on the host, first 0, last T.
            exact: only group segments of equal length (attention without a causal mask would see padding).
            device: where attention runs.
            cp_group: context-parallel group; each rank holds the rows of `context.rank_rows`.
            lengths: int32 [D + 1] on the host, cumulated lengths without alignment tails; None without tails.  The
                mask must be causal.
        """
        assert lengths is None or not exact, "without a causal mask, tokens would see the tails"
        starts = bounds.tolist()
        longest = max(_row_counts(starts), default=0)
        share = (1, 0)
        if cp_group is not None:
            share = (cp_group.size(), cp_group.rank())
        rows = send(bounds, device)
        documents = rows
        padded_rows = None
        if share[0] > 1 and lengths is not None and lengths.tolist() != starts:
            documents = send(lengths, device)
            padded_rows = rows
        has_tails = padded_rows is not None
        return cls(
            qkv_format="thd",
            cu_seqlens_q=documents,
            cu_seqlens_kv=documents,
            cu_seqlens_q_padded=padded_rows,
            cu_seqlens_kv_padded=padded_rows,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            pad_between_seqs=has_tails,
            starts=starts,
            exact=exact,
            share=share,
        )

    @cached_property
    def grouping(self) -> Grouping:
        """Group the documents at the first access: Transformer Engine's attention needs no groups."""
        starts = self.starts
        device = self.cu_seqlens_q.device
        widths = _row_counts(starts)
        if self.share[0] > 1:
            groups = _chunk_groups(starts, widths, *self.share)
        elif len(set(widths)) == 1:
            # Documents of one length: a view of the pack is the batch, and nothing is gathered or scattered.
            rows = torch.arange(starts[-1])
            index = send(rows.view(len(widths), widths[0]), device)
            pack_group = DocumentGroup(index, index, is_pack=True)
            return Grouping([pack_group], None)
        else:
            groups = []
            for members in _group_by_length(widths, self.exact):
                group = _document_group(starts, widths, members)
                groups.append(group)
        # Before the groups are sent: it sets their padding to row 0.
        inverse = send(_inverse(groups), device)
        device_groups = []
        for group in groups:
            queries = send(group.queries, device)
            keys = send(group.keys, device)
            device_groups.append(DocumentGroup(queries, keys))
        return Grouping(device_groups, inverse)


def _row_counts(starts: Sequence[int]) -> list[int]:
    return [end - start for start, end in pairwise(starts)]


def _document_group(
    starts: Sequence[int],
    widths: Sequence[int],
    members: Sequence[int],
) -> DocumentGroup:
    """Batch full documents; the first of ``members`` is the longest.  A negative row is padding."""
    longest = widths[members[0]]
    columns = torch.arange(longest)[None]
    first_rows = torch.tensor([starts[i] for i in members])[:, None]
    lengths = torch.tensor([widths[i] for i in members])[:, None]
    rows = first_rows + columns
    queries = torch.where(columns < lengths, rows, -1)
    # A tensor of its own: `_inverse` reads the padding off the queries and then sets it.
    keys = queries.clamp(min=0)
    return DocumentGroup(queries, keys)


def _chunk_groups(
    starts: Sequence[int],
    widths: Sequence[int],
    cp: int,
    rank: int,
) -> list[DocumentGroup]:
    """Batch the two chunks that ``rank`` holds of each document, with all keys up to their end."""
    gathered = gathered_rows(starts, cp)
    groups = []
    for members in _group_by_length(widths, exact=True):
        size = widths[members[0]] // (2 * cp)
        document_starts = torch.tensor([starts[i] for i in members])[:, None]
        # This rank's rows of a document begin at its start over cp, the two chunks one after the other.
        first_chunk_starts = document_starts // cp
        for half, chunk in enumerate((rank, 2 * cp - 1 - rank)):
            local_starts = first_chunk_starts + half * size
            queries = local_starts + torch.arange(size)
            key_count = (chunk + 1) * size
            key_rows = document_starts + torch.arange(key_count)
            keys = gathered[key_rows]
            groups.append(DocumentGroup(queries, keys))
    return groups


def _inverse(groups: Sequence[DocumentGroup]) -> Tensor:
    """Return for each query row the index of its output; padding of ``queries`` (negative rows) is set to row 0."""
    rows = torch.cat([group.queries.flatten() for group in groups])
    row_count = int(rows.max()) + 1
    inverse = torch.empty(row_count, dtype=torch.int64)
    is_row = rows >= 0
    outputs = is_row.nonzero()[:, 0]
    inverse[rows[outputs]] = outputs
    for group in groups:
        group.queries.clamp_(min=0)
    return inverse


def _group_by_length(lengths: Sequence[int], exact: bool) -> list[list[int]]:
    """Return indices of ``lengths`` in groups of like length, longest first within a group."""
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    for i in longest_first:
        if groups:
            last = groups[-1]
            longest = lengths[last[0]]
            shortest = longest if exact else _MIN_FILL * longest
            padded_tokens = (len(last) + 1) * longest
            if lengths[i] >= shortest and padded_tokens <= _GROUP_TOKENS:
                last.append(i)
                continue
        groups.append([i])
    return groups
