"""Which rows a context-parallel rank holds, how packs are aligned for it, and how images are shared."""

import itertools
import random
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from ovr_megatron.config import ParallelConfig
from ovr_megatron.data.packing import IGNORED, Pack
from ovr_megatron.model.context import gathered_rows, rank_rows, share_images
from ovr_megatron.model.layout import alignment
from tests.model.engine_source import source_functions


def test_two_documents_on_two_ranks() -> None:
    assert rank_rows([0, 8, 12], 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert rank_rows([0, 8, 12], 2, 1).tolist() == [2, 3, 4, 5, 9, 10]
    assert gathered_rows([0, 8, 12], 2).tolist() == [0, 1, 6, 7, 8, 9, 2, 3, 4, 10, 11, 5]


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_every_row_lives_once_and_the_causal_work_is_even(cp: int) -> None:
    rng = random.Random(cp)
    bounds = [0]
    for _ in range(5):
        bounds.append(bounds[-1] + 2 * cp * rng.randrange(1, 9))
    shares = [rank_rows(bounds, cp, rank) for rank in range(cp)]
    assert sorted(torch.cat(shares).tolist()) == list(range(bounds[-1]))
    assert torch.equal(torch.cat(shares)[gathered_rows(bounds, cp)], torch.arange(bounds[-1]))
    start = torch.tensor(bounds[:-1])
    seen = [sum(int(row - start[start <= row].max() + 1) for row in share) for share in shares]
    assert len(set(seen)) == 1


def make_pack(lengths: list[int]) -> Pack:
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    total = int(bounds[-1])
    return Pack(
        tokens=torch.arange(total) + 100,
        labels=torch.arange(total) + 200,
        position_ids=torch.cat([torch.arange(n) for n in lengths]).expand(3, -1).clone(),
        cu_seqlens=bounds.int(),
        patches=torch.zeros(4, 2),
        grid_thw=torch.tensor([[1, 2, 2]]),
        placement=torch.tensor([total - 1]),
        extras={"advantages": torch.arange(total) + 0.5},
    )


@pytest.mark.parametrize(("document", "total"), [(4, 4), (1, 8), (6, 12), (4, 16)])
def test_alignment_tails_carry_nothing(document: int, total: int) -> None:
    pack = make_pack([5, 1, 8, 3])
    aligned = pack.aligned(document, total)
    assert len(aligned.tokens) % total == 0
    widths = [b - a for a, b in pairwise(aligned.bounds.tolist())]
    assert all(width % document == 0 for width in widths)
    assert torch.equal(aligned.cu_seqlens, pack.cu_seqlens)
    kept = aligned.labels != IGNORED
    assert torch.equal(aligned.labels[kept], pack.labels)
    assert torch.equal(aligned.tokens[kept], pack.tokens)
    assert torch.equal(aligned.position_ids[:, kept], pack.position_ids)
    assert torch.equal(aligned.extras["advantages"][kept], pack.extras["advantages"])
    assert aligned.tokens[aligned.placement].tolist() == pack.tokens[pack.placement].tolist()
    assert not aligned.extras["advantages"][~kept].any() and not aligned.position_ids[:, ~kept].any()


def test_a_pack_that_fits_is_left_alone() -> None:
    pack = make_pack([4, 8])
    assert pack.aligned(4, 4) is pack and pack.aligned(1, 1) is pack


def rows_of_a_rank(recipe: str, parallel: ParallelConfig, lengths: list[int]) -> int:
    """Rows that a rank's matrix products have of a pack of these documents."""
    rows = len(make_pack(lengths).aligned(*alignment(parallel, recipe)).tokens)
    ranks = parallel.cp * (parallel.tp if parallel.sequence_parallel else 1)
    assert rows % ranks == 0
    return rows // ranks


FP8_LAYOUTS = [
    ParallelConfig(tp=tp, cp=cp, sequence_parallel=sequence_parallel)
    for tp, cp, sequence_parallel in itertools.product((1, 2, 4, 8), (1, 2, 3, 4), (False, True))
    if tp > 1 or not sequence_parallel
]


@pytest.mark.parametrize("recipe", ["delayed", "current", "block"])
def test_eight_bit_products_take_the_rows_of_every_layout(recipe: str) -> None:
    """By the rules of Transformer Engine's text where it is here, else by their transcription.

    ``assert_dim_for_fp8_exec`` (multiples of 8 rows; the weight's gradient swaps the sides: 16) and, for block scaling,
    ``Float8BlockQuantizer.is_quantizable`` of what a sequence-parallel rank gathers.
    """
    products = source_functions("pytorch/utils.py", ["assert_dim_for_fp8_exec"])
    blocks = source_functions("pytorch/tensor/float8_blockwise_tensor.py", ["is_quantizable"])
    for parallel, tokens in itertools.product(FP8_LAYOUTS, (1, 15, 100, 128, 129, 1000, 2001, 5000)):
        rows = rows_of_a_rank(recipe, parallel, [tokens, 3])
        local = torch.empty(rows, 1, 256, device="meta")
        assert rows % 16 == 0
        if products:
            products["assert_dim_for_fp8_exec"](local, local.flatten(0, 1).t())
        if recipe == "block":
            assert rows % 128 == 0
            assert not blocks or blocks["is_quantizable"](SimpleNamespace(block_len=128), local)


def test_images_are_balanced() -> None:
    assert share_images([4, 16, 8, 8], 2) == [[0, 1], [2, 3]]
    patches = [random.Random(1).randrange(4, 4000) for _ in range(64)]
    loads = [sum(patches[i] for i in share) for share in share_images(patches, 4)]
    assert sum(loads) == sum(patches) and max(loads) - min(loads) <= max(patches)
    assert sorted(i for share in share_images(patches, 4) for i in share) == list(range(64))
    assert share_images([], 3) == [[], [], []] and share_images([7], 2) == [[0], []]
