"""What Transformer Engine's attention makes of a pack with alignment tails, by its own arithmetic, on a CPU.

Its ring attention over context-parallel ranks is executed step by step: which rows it takes, how long it believes the
documents to be, and how it merges.  The lengths come from a transcription of Transformer Engine 2.14 to 2.20, and from
the functions themselves where their source is here (`engine_source`).

Shapes: T rows of the pack, a step's L queries and K keys, one head of H numbers.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ovr_megatron.config import ParallelConfig
from ovr_megatron.data.packing import Pack
from ovr_megatron.model.context import rank_rows
from ovr_megatron.model.layout import alignment
from ovr_megatron.model.segments import Segments
from tests.model.engine_source import source_functions

HEAD = 8
# Lengths of queries and keys of a ring step, as cumulated int32 [D + 1] each.
StepLengths = Callable[[Segments, Tensor, int, int, int, str], tuple[Tensor, Tensor]]


def chunk_lengths(lengths: Tensor, local_rows: Tensor, cp: int, rank: int, halves: tuple[int, ...]) -> Tensor:
    """Cumulated real lengths in the ``halves`` (0 and 1) that ``rank`` holds: ``get_cu_seqlens_on_cp_rank``."""
    chunk = local_rows.diff() // 2
    total = torch.zeros_like(chunk)
    for half in halves:
        number = rank if half == 0 else 2 * cp - rank - 1
        total += (lengths.diff() - number * chunk).clamp(torch.zeros_like(chunk), chunk)
    return torch.cat((lengths[:1], total.cumsum(0).int()))


def transcribed(segments: Segments, local_rows: Tensor, cp: int, rank: int, step: int, section: str) -> tuple:
    """The ``thd`` branches of ``cp_p2p_fwd_prepare_qkv``."""
    lengths = segments.cu_seqlens_q
    queries = (1,) if section == "upper-triangle" else (0, 1)
    keys = (0,) if section == "lower-triangle" else (0, 1)
    if segments.pad_between_seqs:
        source = (rank - step) % cp
        own = chunk_lengths(lengths, local_rows, cp, rank, queries)
        return own, chunk_lengths(lengths, local_rows, cp, source, keys)
    return lengths // (cp * 2 // len(queries)), lengths // (cp * 2 // len(keys))


def own_text() -> StepLengths | None:
    """The same from Transformer Engine's source; None where it is not here."""
    names = ("get_cu_seqlens_on_cp_rank", "cp_p2p_fwd_prepare_qkv")
    scope = source_functions("pytorch/attention/dot_product_attention/context_parallel.py", names)
    if scope is None:
        return None

    class Extension:
        @staticmethod
        def thd_read_half_tensor(x: Tensor, local_rows: Tensor, half: int) -> Tensor:
            return x[half_rows(local_rows, half)]

    scope["tex"] = Extension

    def lengths(segments: Segments, local_rows: Tensor, cp: int, rank: int, step: int, section: str) -> tuple:
        rows = torch.zeros(int(local_rows[-1]), 1, 1)
        cumulated = (segments.cu_seqlens_q, segments.cu_seqlens_kv, local_rows, local_rows, None, None)
        prepare = scope["cp_p2p_fwd_prepare_qkv"]
        *_, queries, keys = prepare(
            rows, rows, rows, "thd", segments.pad_between_seqs, *cumulated, rank, step, cp, section
        )
        return queries, keys

    return lengths


def half_rows(local_rows: Tensor, half: int) -> Tensor:
    """The rows of a rank that lie in the first or second half of their document: int64 [T / cp / 2]."""
    parts = []
    for start, end in pairwise(local_rows.tolist()):
        middle = start + (end - start) // 2
        parts.append(torch.arange(middle, end) if half else torch.arange(start, middle))
    return torch.cat(parts)


def attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[Tensor, Tensor], rows: tuple[Tensor, Tensor], causal: bool
) -> tuple[Tensor, Tensor]:
    """Output [L, H] and log-sum-exp [L] of documents that begin at ``rows`` and are as long as ``lengths`` say."""
    out, norm = torch.zeros_like(query), torch.full((len(query),), -math.inf, dtype=query.dtype)
    for document in range(len(rows[0]) - 1):
        (first_query, first_key), (count, keys) = (
            [int(starts[document]) for starts in rows],
            [int(cumulated.diff()[document]) for cumulated in lengths],
        )
        if not count or not keys:
            continue
        own = slice(first_query, first_query + count)
        seen = slice(first_key, first_key + keys)
        scores = query[own] @ key[seen].t() / math.sqrt(HEAD)
        if causal:
            scores = scores.masked_fill(torch.ones(count, keys, dtype=torch.bool).triu(1), -math.inf)
        norm[own] = scores.logsumexp(-1)
        out[own] = scores.softmax(-1) @ value[seen]
    return out, norm


def merged(out: Tensor, norm: Tensor, step_out: Tensor, step_norm: Tensor) -> tuple[Tensor, Tensor]:
    """Take a step's result into the running one, each weighed by e^(its log-sum-exp - the sum's)."""
    total = torch.logaddexp(norm, step_norm)
    shift = torch.where(total == -math.inf, 0.0, total)
    out = out * (norm - shift).exp()[:, None] + step_out * (step_norm - shift).exp()[:, None]
    return out, total


def ring(segments: Segments, query: Tensor, key: Tensor, value: Tensor, cp: int, step_lengths: StepLengths) -> Tensor:
    """Output [T, H] of ring attention: at step i rank r holds the keys of rank r - i."""
    padded = segments.cu_seqlens_q if segments.cu_seqlens_q_padded is None else segments.cu_seqlens_q_padded
    local_rows = padded // cp
    half = local_rows // 2
    shares = [rank_rows(padded.tolist(), cp, rank) for rank in range(cp)]
    output = torch.zeros_like(query)
    for rank, own in enumerate(shares):
        out, norm = torch.zeros_like(query[own]), torch.full((len(own),), -math.inf, dtype=query.dtype)
        for step in range(cp):
            section = "diagonal" if step == 0 else "lower-triangle" if step <= rank else "upper-triangle"
            source = shares[(rank - step) % cp]
            queries = half_rows(local_rows, 1) if section == "upper-triangle" else torch.arange(len(own))
            keys = half_rows(local_rows, 0) if section == "lower-triangle" else torch.arange(len(source))
            rows = (half if len(queries) < len(own) else local_rows, half if len(keys) < len(source) else local_rows)
            lengths = step_lengths(segments, local_rows, cp, rank, step, section)
            visible = key[source[keys]], value[source[keys]]
            step_out, step_norm = attention(query[own[queries]], *visible, lengths, rows, section == "diagonal")
            out[queries], norm[queries] = merged(out[queries], norm[queries], step_out, step_norm)
        output[own] = out
    return output


@dataclass(frozen=True)
class Group:
    """Stands for a context-parallel process group, of which the sizes alone are asked."""

    ranks: int

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return 0


def aligned_pack(lengths: tuple[int, ...], parallel: ParallelConfig) -> Pack:
    """A pack of documents of these ``lengths``, aligned as the engine aligns it."""
    total = sum(lengths)
    tokens, bounds = torch.zeros(total, dtype=torch.int64), torch.tensor([0, *lengths]).cumsum(0).int()
    visual = torch.zeros(0, 1), torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    return Pack(tokens, tokens, torch.zeros(3, total, dtype=torch.int64), bounds, *visual).aligned(*alignment(parallel))


def segments_of(pack: Pack, cp: int) -> Segments:
    lengths = None if pack.cu_seqlens_padded is None else pack.cu_seqlens
    group: Any = Group(cp)
    return Segments.build(pack.bounds, exact=False, device=torch.device("cpu"), cp_group=group, lengths=lengths)


def layouts(cp: int) -> list[tuple[tuple[int, ...], ParallelConfig]]:
    """One document and two, each with every tail, alone and with the rows that sequence parallelism adds."""
    unit = 2 * cp
    tails = range(unit + 1, 2 * unit + 1)
    lengths = [*((n,) for n in tails), *itertools.product(tails, tails)]
    return [
        (documents, ParallelConfig(cp=cp, tp=tp, sequence_parallel=tp > 1)) for documents in lengths for tp in (1, 4)
    ]


def widest_error(lengths: tuple[int, ...], parallel: ParallelConfig, step_lengths: StepLengths) -> float:
    """Largest difference of a real row's output from full attention over its own document."""
    pack = aligned_pack(lengths, parallel)
    segments = segments_of(pack, parallel.cp)
    generator = torch.Generator().manual_seed(sum(lengths))
    query, key, value = torch.randn(3, len(pack.tokens), HEAD, dtype=torch.float64, generator=generator)
    output = ring(segments, query, key, value, parallel.cp, step_lengths)
    expected, _ = attention(
        query, key, value, (pack.cu_seqlens, pack.cu_seqlens), (pack.bounds, pack.bounds), causal=True
    )
    real = torch.cat([start + torch.arange(n) for start, n in zip(pack.bounds.tolist(), lengths, strict=False)])
    return float((output - expected)[real].abs().max())


@pytest.mark.parametrize("step_lengths", [transcribed, own_text()], ids=["transcription", "own text"])
@pytest.mark.parametrize("cp", [1, 2, 4])
def test_ring_attention_is_attention(cp: int, step_lengths: StepLengths | None) -> None:
    if step_lengths is None:
        pytest.skip("Transformer Engine's source is not here")
    wrong = {
        f"{lengths}, tp={parallel.tp}": error
        for lengths, parallel in layouts(cp)
        if not (error := widest_error(lengths, parallel, step_lengths)) < 1e-12
    }
    assert not wrong


def test_lengths_that_are_divided_go_wrong_with_any_tail() -> None:
    """Without the flag the ring drops keys: the test above can fail."""
    pack = aligned_pack((13,), ParallelConfig(cp=2))
    segments = segments_of(pack, 2)
    segments.pad_between_seqs = False
    query, key, value = torch.randn(3, len(pack.tokens), HEAD, generator=torch.Generator().manual_seed(0))
    expected, _ = attention(query, key, value, (pack.cu_seqlens,) * 2, (pack.bounds,) * 2, causal=True)
    error = (ring(segments, query, key, value, 2, transcribed) - expected)[:13].abs().amax(-1)
    assert int((error > 1e-3).sum()) > 4


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_transformer_engine_knows_of_every_tail(cp: int) -> None:
    """Under context parallelism by the flag; without, there is none: the last document reaches the end of the rows."""
    for lengths, parallel in layouts(cp):
        pack = aligned_pack(lengths, parallel)
        segments = segments_of(pack, cp)
        has_tails = pack.cu_seqlens.tolist() != pack.bounds.tolist()
        assert segments.pad_between_seqs == (cp > 1 and has_tails)
        if segments.pad_between_seqs:
            assert torch.equal(segments.cu_seqlens_q, pack.cu_seqlens)
            assert torch.equal(segments.cu_seqlens_q_padded, pack.bounds)
        else:
            assert torch.equal(segments.cu_seqlens_q, pack.bounds)
            assert segments.cu_seqlens_q_padded is None
        assert segments.cu_seqlens_kv is segments.cu_seqlens_q
        assert segments.cu_seqlens_kv_padded is segments.cu_seqlens_q_padded
