"""A layout in a line: what is written is read as the same layout."""

from itertools import product

import pytest

from ovr_megatron.config import ParallelConfig
from ovr_megatron.config.layout_text import format_layout, parse_layout

SHARDED = ParallelConfig(tp=2, cp=4, sequence_parallel=True, distributed_optimizer=True, overlap=True)


def every_layout() -> list[ParallelConfig]:
    layouts = []
    for tp, pp, vpp, cp in product((1, 2), (1, 4), (1, 2), (1, 8)):
        for sequence, zero, overlap in product((False, True), repeat=3):
            if (sequence and tp == 1) or (vpp > 1 and pp == 1):
                continue
            switches = {"sequence_parallel": sequence, "distributed_optimizer": zero, "overlap": overlap}
            layouts.append(ParallelConfig(tp=tp, pp=pp, vpp=vpp, cp=cp, **switches))
    return layouts


def test_what_is_written_is_read_as_the_same() -> None:
    texts = [format_layout(parallel) for parallel in every_layout()]
    assert [parse_layout(text) for text in texts] == [(parallel, 1) for parallel in every_layout()]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    ("text", "parallel"),
    [
        ("tp=1", ParallelConfig()),
        ("tp=2,cp=4,sp=1,zero=1", SHARDED),
        ("pp=2,vpp=2,overlap=1", ParallelConfig(pp=2, vpp=2, overlap=True)),
        ("zero=1,overlap=0", ParallelConfig(distributed_optimizer=True)),
    ],
)
def test_the_spelling(text: str, parallel: ParallelConfig) -> None:
    assert format_layout(parallel) == text


def test_the_data_parallel_size_stands_beside_the_layout() -> None:
    assert parse_layout("tp=2,dp=3") == (ParallelConfig(tp=2), 3)
    assert parse_layout("") == (ParallelConfig(), 1)
