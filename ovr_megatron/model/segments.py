"""Bounds of documents (or attention windows) in a pack, and their batches for attention without Transformer Engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import TypeAlias

import numpy as np
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
# Fewest rows of a run; documents of shorter runs are batched by length.  On a CPU padding and copies of 64 rows cost
# more than another call of the kernel, on a GPU a call costs more.
_CPU_RUN_ROWS = 64
_GPU_RUN_ROWS = 1024


@dataclass(frozen=True)
class DocumentRun:
    """Consecutive documents of one length, of which a view of the pack is the batch.

    Attributes:
        first: row of the pack at which they begin.
        documents: how many they are.
        length: rows of each.
    """

    first: int
    documents: int
    length: int

    @property
    def end(self) -> int:
        """First row of the pack after them."""
        return self.first + self.documents * self.length

    @property
    def index(self) -> Tensor:
        """Their rows, [documents, length]."""
        return torch.arange(self.first, self.end).view(self.documents, self.length)


# Rows of a pack as a batch of documents: a run, or the index [B, L] of each row.
Rows: TypeAlias = DocumentRun | Tensor


@dataclass
class DocumentGroup:
    """Rows attended together: ``queries`` [B, L] among this rank's rows, ``keys`` [B, K] among all ranks' rows.

    The last query sees all keys; under a causal mask the one before it all but the last, and so on.  Shorter
    documents are padded with row 0.

    Attributes:
        padding: bool [B, L], which queries are padding; None: none.
        padded_rows: int64 [B, L], the queries, but for padding the row after the last of the pack; None: no padding.
    """

    queries: Rows
    keys: Rows
    padding: Tensor | None = None
    padded_rows: Tensor | None = None

    @property
    def output_rows(self) -> Rows:
        """Rows to which the outputs are written, in a buffer of one row more than the pack."""
        return self.queries if self.padded_rows is None else self.padded_rows

    @property
    def index(self) -> Tensor:
        """Rows of the queries [B, L]."""
        return self.queries.index if isinstance(self.queries, DocumentRun) else self.queries

    def to(self, device: torch.device, row_count: int) -> DocumentGroup:
        """Return the group of a pack of ``row_count`` rows on ``device``."""
        queries = _send_rows(self.queries, device)
        if self.padding is None:
            return DocumentGroup(queries, _send_rows(self.keys, device))
        padding = send(self.padding, device)
        padded_rows = send(self.index.masked_fill(self.padding, row_count), device)
        return DocumentGroup(queries, _send_rows(self.keys, device), padding, padded_rows)


@dataclass(frozen=True)
class SharedPrompt:
    """Rows of a prompt, ``keys`` [1, K], and of all documents that see it before their own, ``queries`` [1, Q]."""

    queries: Rows
    keys: Rows


def _send_rows(rows: Rows, device: torch.device) -> Rows:
    return rows if isinstance(rows, DocumentRun) else send(rows, device)


@dataclass(frozen=True)
class Grouping:
    """The batches of attention without Transformer Engine over a pack.

    Attributes:
        groups: runs, and documents batched by length; under context parallelism the keys of each begin with its
            shared prompt.
        inverse: [T], for each row of this rank its row in the concatenated outputs of the groups; None: the same.
        prompts: shared prompts; empty under context parallelism.  Where there are any, the groups' keys are each
            document's own rows alone.
    """

    groups: list[DocumentGroup]
    inverse: Tensor | None
    prompts: Sequence[SharedPrompt] = ()


@dataclass
class Segments(PackedSeqParams):
    """`PackedSeqParams` of a pack, and the arguments of `grouping`.

    Attributes:
        pad_between_seqs: whether documents end before their rows do; unset, Transformer Engine would ask the device.
        starts: [D + 1], the ``bounds`` of `build`.
        prefixes: for each document the first row and the number of rows of the shared prompt before it; empty where no
            document has one.
        key_rows: int64, for Transformer Engine the rows of the keys of all documents, one after the other, as
            ``cu_seqlens_kv`` cuts them; None: the rows of the pack.
        exact: as for `build`.
        share: size of the context-parallel group and this rank in it.
        feature_rows: int64, this rank's rows that `FeatureLayer` adds features to; None: no rows.
    """

    pad_between_seqs: bool = False
    starts: Sequence[int] = ()
    prefixes: Sequence[tuple[int, int]] = ()
    key_rows: Tensor | None = None
    exact: bool = False
    share: tuple[int, int] = (1, 0)
    feature_rows: Tensor | None = None

    @classmethod
    def build(
        cls,
        bounds: Tensor,
        exact: bool,
        device: torch.device,
        cp_group: dist.ProcessGroup | None = None,
        lengths: Tensor | None = None,
        prefix_of: Tensor | None = None,
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
            prefix_of: int64 [D] on the host, `Pack.prefix_of`; the mask must be causal.
        """
        assert lengths is None or not exact, "without a causal mask, tokens would see the tails"
        assert prefix_of is None or not exact, "without a causal mask, a prompt would have to see its documents"
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
        segments = cls(
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
        if prefix_of is not None and (prefix_of >= 0).any():
            segments._put_prefixes_first(prefix_of.tolist(), (bounds if lengths is None else lengths).diff().tolist())
        return segments

    def _put_prefixes_first(self, prefix_of: Sequence[int], lengths: Sequence[int]) -> None:
        """Give each document the keys of the shared prompt before its own.

        Args:
            prefix_of: of each document, `Pack.prefix_of`.
            lengths: rows of each document without its tail, which no later document may see.
        """
        prefixes = []
        key_rows = []
        key_counts = []
        for document, (start, end) in enumerate(pairwise(self.starts)):
            prefix = prefix_of[document]
            first, count = (self.starts[prefix], lengths[prefix]) if prefix >= 0 else (start, 0)
            prefixes.append((first, count))
            rows = torch.cat((torch.arange(first, first + count), torch.arange(start, end)))
            key_rows.append(rows)
            key_counts.append(len(rows))
        self.prefixes = prefixes
        if self.share[0] > 1:
            return  # Transformer Engine's ring attention has no such keys, see `Engine`
        device = self.cu_seqlens_q.device
        self.key_rows = send(torch.cat(key_rows), device)
        key_bounds = np.cumsum([0, *key_counts]).astype(np.int32)
        self.cu_seqlens_kv = send(torch.from_numpy(key_bounds), device)
        self.max_seqlen_kv = max(key_counts)

    @cached_property
    def grouping(self) -> Grouping:
        """Group the documents at the first access: Transformer Engine's attention needs no groups."""
        starts = self.starts
        device = self.cu_seqlens_q.device
        widths = _row_counts(starts)
        prompts: list[SharedPrompt] = []
        if self.share[0] > 1:
            prefixes = self.prefixes or [(0, 0)] * len(widths)
            groups = _chunk_groups(starts, widths, prefixes, *self.share)
        else:
            least_rows = _CPU_RUN_ROWS
            if device.type != "cpu":
                least_rows = _GPU_RUN_ROWS
            runs, others = _split_runs(starts, least_rows)
            groups = [DocumentGroup(run, run) for run in runs]
            other_widths = [widths[i] for i in others]
            for members in _group_by_length(other_widths, [0] * len(others), self.exact):
                group = _document_group(starts, widths, [others[i] for i in members])
                groups.append(group)
            for prompt in _shared_prompts(starts, self.prefixes):
                prompts.append(SharedPrompt(_send_rows(prompt.queries, device), prompt.keys))
        inverse = _inverse(groups)
        device_inverse = None if inverse is None else send(inverse, device)
        device_groups = [group.to(device, starts[-1]) for group in groups]
        return Grouping(device_groups, device_inverse, prompts)


def _row_counts(starts: Sequence[int]) -> list[int]:
    return [end - start for start, end in pairwise(starts)]


def _split_runs(starts: Sequence[int], least_rows: int) -> tuple[list[DocumentRun], list[int]]:
    """Return the runs of at least ``least_rows`` rows, and the documents in no such run.

    Documents of one length that fill the pack are always a run.
    """
    widths = _row_counts(starts)
    runs = []
    others: list[int] = []
    document = 0
    for length, members in groupby(widths):
        documents = len(list(members))
        run = DocumentRun(starts[document], documents, length)
        if documents * length >= least_rows or documents == len(widths):
            runs.append(run)
        else:
            others.extend(range(document, document + documents))
        document += documents
    return runs, others


def _document_group(starts: Sequence[int], widths: Sequence[int], members: Sequence[int]) -> DocumentGroup:
    """Batch full documents; the first of ``members`` is the longest."""
    longest = widths[members[0]]
    columns = torch.arange(longest)[None]
    first_rows = torch.tensor([starts[i] for i in members])[:, None]
    lengths = torch.tensor([widths[i] for i in members])[:, None]
    rows = first_rows + columns
    padding = columns >= lengths
    index = rows.masked_fill(padding, 0)
    return DocumentGroup(index, index, padding if padding.any() else None)


def _shared_prompts(starts: Sequence[int], prefixes: Sequence[tuple[int, int]]) -> list[SharedPrompt]:
    """Return each shared prompt with the rows of all documents that see it.

    Args:
        starts: `Segments.starts`.
        prefixes: `Segments.prefixes`.
    """
    rows_of_prompt: dict[tuple[int, int], list[Tensor]] = {}
    if not prefixes:
        return []
    for prefix, (start, end) in zip(prefixes, pairwise(starts), strict=True):
        _, count = prefix
        if count:
            rows_of_prompt.setdefault(prefix, []).append(torch.arange(start, end))
    prompts = []
    for (first, count), rows in rows_of_prompt.items():
        index = torch.cat(rows)[None]
        first_query = int(index[0, 0])
        query_count = index.numel()
        run = DocumentRun(first_query, 1, query_count)
        queries = run if torch.equal(run.index, index) else index
        prompts.append(SharedPrompt(queries, DocumentRun(first, 1, count)))
    return prompts


def _prefix_rows(prefixes: Sequence[tuple[int, int]], members: Sequence[int]) -> Tensor:
    """Return the rows of the prefixes of ``members``, [B, rows of a prefix]."""
    first_rows = torch.tensor([prefixes[i][0] for i in members])[:, None]
    _, count = prefixes[members[0]]
    return first_rows + torch.arange(count)


def _chunk_groups(
    starts: Sequence[int],
    widths: Sequence[int],
    prefixes: Sequence[tuple[int, int]],
    cp: int,
    rank: int,
) -> list[DocumentGroup]:
    """Batch the two chunks that ``rank`` holds of each document, with the prefix's keys and its own up to their end."""
    gathered = gathered_rows(starts, cp)
    groups = []
    # Padding at the end of a document is seen by no row of it; padding between prefix and document would be.
    prefix_counts = [count for _, count in prefixes]
    for members in _group_by_length(widths, prefix_counts, exact=True):
        prefix_rows = _prefix_rows(prefixes, members)
        size = widths[members[0]] // (2 * cp)
        document_starts = torch.tensor([starts[i] for i in members])[:, None]
        # This rank's rows of a document begin at its start over cp, the two chunks one after the other.
        first_chunk_starts = document_starts // cp
        for half, chunk in enumerate((rank, 2 * cp - 1 - rank)):
            local_starts = first_chunk_starts + half * size
            queries = local_starts + torch.arange(size)
            key_count = (chunk + 1) * size
            key_rows = document_starts + torch.arange(key_count)
            keys = gathered[torch.cat((prefix_rows, key_rows), dim=1)]
            groups.append(DocumentGroup(queries, keys))
    return groups


def _inverse(groups: Sequence[DocumentGroup]) -> Tensor | None:
    """Return for each query row the index of its output; None where that is the row itself."""
    indices = []
    paddings = []
    for group in groups:
        index = group.index
        padding = group.padding
        if padding is None:
            padding = torch.zeros_like(index, dtype=torch.bool)
        indices.append(index.flatten())
        paddings.append(padding.flatten())
    rows = torch.cat(indices)
    outputs = (~torch.cat(paddings)).nonzero()[:, 0]
    inverse = torch.empty(len(outputs), dtype=torch.int64)
    inverse[rows[outputs]] = outputs
    identity = torch.arange(len(rows))
    return None if torch.equal(inverse, identity) else inverse


def _group_by_length(lengths: Sequence[int], prefix_counts: Sequence[int], exact: bool) -> list[list[int]]:
    """Return indices of ``lengths`` in groups of like length and equal prefix, longest first within a group."""
    longest_first = sorted(range(len(lengths)), key=lambda i: (prefix_counts[i], -lengths[i]))
    groups: list[list[int]] = []
    for i in longest_first:
        if groups:
            last = groups[-1]
            longest = lengths[last[0]]
            shortest = longest if exact else _MIN_FILL * longest
            padded_tokens = (len(last) + 1) * longest
            same_prefix = prefix_counts[i] == prefix_counts[last[0]]
            if same_prefix and lengths[i] >= shortest and padded_tokens <= _GROUP_TOKENS:
                last.append(i)
                continue
        groups.append([i])
    return groups
