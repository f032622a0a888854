"""Losses of documents, by hand."""

import math

import pytest
import torch

from ovr_megatron.data.document_losses import DocumentLosses, by_source, merge_parts, worst
from ovr_megatron.data.packing import IGNORED, Origin, Pack

ORIGINS = (Origin("a.jsonl:1", "x", "maths"), Origin("a.jsonl:2", "", "logic"), Origin("b.jsonl:7", "", "maths"))


def pack() -> Pack:
    return Pack(
        tokens=torch.arange(9),
        labels=torch.full((9,), IGNORED),
        position_ids=torch.zeros(3, 9, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 3, 4, 9], dtype=torch.int32),
        patches=torch.zeros(0, 1),
        grid_thw=torch.zeros(0, 3, dtype=torch.int64),
        placement=torch.zeros(0, dtype=torch.int64),
        origins=ORIGINS,
    )


@pytest.mark.parametrize("multiple", [1, 4])  # with 4, documents begin at rows 0, 4 and 8
def test_a_target_belongs_to_the_document_of_its_row(multiple: int) -> None:
    losses = DocumentLosses(replica=0)
    rows = torch.tensor([0, 1, 4, 5, 7] if multiple == 1 else [0, 1, 8, 9, 11])
    losses.add(pack().aligned(multiple, multiple), rows, torch.tensor([1.0, 2.0, 4.0, 8.0, 0.5]))
    found = losses.documents()
    assert [(d.origin, d.total, d.targets) for d in found] == [
        (ORIGINS[0], 3.0, 2),
        (ORIGINS[1], 0.0, 0),
        (ORIGINS[2], 12.5, 3),
    ]
    assert by_source(merge_parts(found)) == {"maths": 15.5 / 5}


def test_parts_of_a_document_on_several_ranks_are_put_together() -> None:
    parts = []
    for rows, values in (([0, 4], [1.0, 2.0]), ([1, 8], [3.0, math.nan])):
        losses = DocumentLosses(replica=1)
        losses.add(pack(), torch.tensor(rows), torch.tensor(values))
        parts += losses.documents()
    found = merge_parts(parts)
    assert [(d.origin.where, d.targets) for d in found] == [("a.jsonl:1", 2), ("b.jsonl:7", 2)]
    assert found[0].mean == 2.0
    first = worst(found, 1)
    assert first[0]["where"] == "b.jsonl:7" and math.isnan(first[0]["loss"])
