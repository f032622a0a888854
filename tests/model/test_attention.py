"""Attention without Transformer Engine, against torch's with a mask written from the rule."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType

from ovr_megatron.model.attention import PackedDotProductAttention, attend, attend_groups
from ovr_megatron.model.segments import DocumentRun, Segments


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("queries", [1, 3, 16])
def test_causal_attention_of_the_last_rows(queries: int, heads: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, rows, 8, requires_grad=True) for n, rows in ((4, queries), (heads, 16), (heads, 16)))
    mask = torch.ones(queries, 16, dtype=torch.bool).tril(16 - queries)
    grad = torch.randn(2, 4, queries, 8)
    ours = attend(q, k, v, causal=True)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    assert torch.allclose(ours, theirs, atol=1e-6)
    gradients = [torch.autograd.grad(out, (q, k, v), grad) for out in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize(
    ("lengths", "prefix_of", "causal"),
    [
        ([5, 5, 5], None, True),  # a view of the pack
        ([3, 9, 10, 2, 8], None, True),  # three of them are a batch with padding
        ([4, 7, 4, 7, 4], None, False),
        ([4, 6, 5, 9, 7, 3], [-1, -1, 0, 1, 0, -1], True),
        ([4, 6, 9, 8, 9, 8], [-1, -1, 1, 0, 0, 1], True),  # prompts and documents alternate, and are a batch
        ([70, 5, 40, 40, 9, 6, 65], None, True),  # runs of 70, 2 x 40 and 65 rows, and a batch with padding
        ([4, 4, 32, 32, 16], None, False),  # a run and documents of other lengths
        ([30, 70, 66, 9, 66], [-1, 0, 0, 0, -1], True),  # the documents of the prompt are one block of rows
        ([30, 20, 66, 66, 70, 40], [-1, -1, 0, 0, 1, 0], True),  # those of the first prompt are not
    ],
)
def test_documents_of_a_pack_see_themselves_and_their_prompt(
    lengths: list[int],
    prefix_of: list[int] | None,
    causal: bool,
    heads: int,
) -> None:
    """By a mask written from the rule, in float64."""
    torch.manual_seed(0)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    size = len(document)
    same = document[:, None] == document[None]
    mask = same.tril() if causal else same
    for row in range(size):
        prompt = -1 if prefix_of is None else prefix_of[document[row]]
        mask[row] |= document == prompt
    query = torch.randn(size, 4, 8, requires_grad=True)
    mixed = torch.randn(size, heads, 16, requires_grad=True)
    key, value = mixed.chunk(2, dim=-1)  # not contiguous, as in the model
    grad = torch.randn(size, 4 * 8)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    prefixes = None if prefix_of is None else torch.tensor(prefix_of)
    segments = Segments.build(bounds, exact=not causal, device=torch.device("cpu"), prefix_of=prefixes)
    mask_type = AttnMaskType.padding_causal if causal else AttnMaskType.padding
    groups = SimpleNamespace(cp=None)
    attention = PackedDotProductAttention(
        SimpleNamespace(context_parallel_size=1), attn_mask_type=mask_type, pg_collection=groups
    )
    ours = attention(query, key, value, None, attn_mask_type=mask_type, packed_seq_params=segments)
    rows = [x.double().transpose(0, 1)[None] for x in (query, key, value)]
    theirs = F.scaled_dot_product_attention(*rows, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1).flatten(1)
    assert torch.allclose(ours.double(), theirs, atol=1e-6)
    gradients = [torch.autograd.grad(out, (query, mixed), grad.to(out.dtype)) for out in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=2e-6)
    if prefix_of is None:  # the way of a GPU
        by_torch = attend_groups(query, key, value, segments.grouping, causal, None)
        assert torch.allclose(by_torch, ours, atol=1e-6)


def test_bfloat16_is_within_its_rounding() -> None:
    torch.manual_seed(0)
    bounds = torch.tensor([0, 30, 100, 109, 179], dtype=torch.int32)
    segments = Segments.build(bounds, exact=False, device=torch.device("cpu"), prefix_of=torch.tensor([-1, 0, 0, 0]))
    attention = PackedDotProductAttention(
        SimpleNamespace(context_parallel_size=1),
        attn_mask_type=AttnMaskType.padding_causal,
        pg_collection=SimpleNamespace(cp=None),
    )
    results = []
    rows = torch.randn(179, 8, 8).bfloat16()
    for dtype in (torch.bfloat16, torch.float32):
        leaf = rows.to(dtype).requires_grad_()
        query, key, value = leaf.split((4, 2, 2), dim=1)
        out = attention(query, key, value, None, attn_mask_type=AttnMaskType.padding_causal, packed_seq_params=segments)
        (gradient,) = torch.autograd.grad(out.sum(), leaf)  # a gradient without strides of its own
        results.append((out.float(), gradient.float()))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() < 0.01 * b.norm()


def test_no_group_of_a_long_document_is_square_in_memory() -> None:
    segments = Segments.build(torch.tensor([0, 65536], dtype=torch.int32), exact=False, device=torch.device("cpu"))
    (group,) = segments.grouping.groups
    assert group.queries == group.keys == DocumentRun(0, 1, 65536)
