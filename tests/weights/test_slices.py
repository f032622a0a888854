"""The plan of an update, played on arrays: whatever the layouts, everyone gets what is theirs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovr_megatron.weights.slices import LocalShard, RowRange, ShardLayout, SliceError, plan, row_ranges, rows_of
from ovr_megatron.weights.table import cut_dim, from_hf, padded_vocab, rows, split
from tests.weights.test_table import random_tensors, small_shape


def test_runs_by_hand() -> None:
    shape = small_shape(heads=4, kv_heads=2, head_dim=4, vocab=11)
    named = {row.megatron.removeprefix("decoder.layers.1."): row for row in rows(shape)}
    q, k, v = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv")
    assert row_ranges(named["self_attention.linear_qkv.weight"], 2, 1, shape) == (
        RowRange(q, 8, 0, 8),
        RowRange(k, 4, 8, 4),
        RowRange(v, 4, 12, 4),
    )
    assert len(row_ranges(named["self_attention.linear_qkv.weight"], 1, 0, shape)) == 6
    without_padding = (RowRange("lm_head.weight", 6, 0, 5),)
    assert row_ranges(named["output_layer.weight"], 2, 1, shape) == without_padding
    down = "model.layers.1.mlp.down_proj.weight"
    assert row_ranges(named["mlp.linear_fc2.weight"], 2, 1, shape) == (RowRange(down, 3, 0, 3),)


LAYOUT = st.tuples(st.sampled_from([1, 2]), st.sampled_from([1, 2, 3]))


@settings(max_examples=60, deadline=None)
@given(LAYOUT, LAYOUT, st.integers(16, 600), st.booleans())
def test_every_rank_gets_what_it_wants(ours, theirs, bucket, trained_only) -> None:
    """Both sides are Megatron's layouts here; a rank has the rows of one stage and wants those of all stages."""
    shape = small_shape(heads=4, kv_heads=2, vision_heads=2)
    table = [row for row in rows(shape) if "layers.1" in row.megatron or "layers" not in row.megatron]
    whole = {row.megatron: from_hf(row, random_tensors(row, i), shape) for i, row in enumerate(table)}
    (tp, pp), (engine_tp, replicas) = ours, theirs
    ranks = max(tp * pp, engine_tp * replicas)
    ranks += -ranks % (tp * pp)
    ranks = ranks if ranks % engine_tp == 0 else ranks * engine_tp
    held: list[list[LocalShard]] = []
    for rank in range(ranks):
        stage = rank // tp % pp
        mine = [row for i, row in enumerate(table) if i % pp == stage]
        parameters = [split(row, whole[row.megatron], tp, rank % tp, shape).contiguous() for row in mine]
        held.append(
            [
                LocalShard(
                    parameter, cut_dim(row), row_ranges(row, tp, rank % tp, shape), row.megatron.startswith("decoder")
                )
                for row, parameter in zip(mine, parameters, strict=True)
            ]
        )
    parts = [[one.layout() for one in mine] for mine in held]
    expected, wanted = [], []
    for rank in range(ranks):
        own = rank % engine_tp
        expected.append([split(row, whole[row.megatron], engine_tp, own, shape).contiguous() for row in table])
        wanted.append(
            [ShardLayout(cut_dim(row), 0, torch.float32, True, row_ranges(row, engine_tp, own, shape)) for row in table]
        )
    plans = [plan(parts, wanted, rank, bucket, trained_only) for rank in range(ranks)]
    assert len({len(steps) for steps in plans}) == 1
    found = [[torch.zeros_like(tensor) for tensor in tensors] for tensors in expected]
    for number in range(len(plans[0])):
        steps = [steps[number] for steps in plans]
        sent = sorted(piece for step in steps for piece in step.sends)
        assert sent == sorted(piece for step in steps for piece in step.receives)
        for rank, step in enumerate(steps):
            assert all(piece.target == rank for piece in step.receives + step.copies)
            moved = step.sends + step.receives
            assert sum(piece.padded_bytes for piece in moved) <= bucket or len(moved) == 1
            for piece in step.receives + step.copies:
                source = held[piece.source][piece.source_index]
                into = rows_of(found[rank][piece.target_index], source.dim, piece.target_offset, piece.length)
                into.copy_(rows_of(source.parameter, source.dim, piece.source_offset, piece.length))
    for mine, theirs_ in zip(found, expected, strict=True):
        for row, a, b in zip(table, mine, theirs_, strict=True):
            if not trained_only or row.megatron.startswith("decoder"):
                assert torch.equal(a, b), row.megatron
            else:
                assert not a.any(), f"{row.megatron} is not trained"
    assert padded_vocab(shape, 2) == 12


def test_what_nobody_holds() -> None:
    part = ShardLayout(0, 4, torch.float32, True, (RowRange("a", 0, 0, 3),))
    with pytest.raises(SliceError, match="no rank holds row 3 of a"):
        plan([[part]], [[part._replace(ranges=(RowRange("a", 2, 0, 4),))]], 0, 100)
    with pytest.raises(SliceError, match="cut along 0 on rank 0, not along 1"):
        plan([[part]], [[part._replace(dim=1)]], 0, 100)


def test_the_nearest_rank_sends() -> None:
    part = ShardLayout(0, 4, torch.float32, True, (RowRange("a", 0, 0, 3),))
    other = part._replace(ranges=(RowRange("b", 0, 0, 3),))
    held = [[part], [other], [other], [part], [other]]
    wanted = [[part]] * 5
    assert sources(held, wanted) == [[0], [0], [3], [3], [3]]


def test_ranks_that_hold_nothing_share_those_that_want_nothing() -> None:
    """Four ranks receive from the three that train, which complete nothing themselves."""
    part = ShardLayout(0, 4, torch.float32, True, (RowRange("a", 0, 0, 3),))
    held = [[part], [part], [part], [], [], [], []]
    wanted = [[], [], [], [part], [part], [part], [part]]
    assert sources(held, wanted) == [[], [], [], [0], [1], [2], [0]]
    assert [plan(held, wanted, rank, 100)[-1].complete for rank in range(7)] == [[]] * 3 + [[0]] * 4


def sources(held: list[list[ShardLayout]], wanted: list[list[ShardLayout]]) -> list[list[int]]:
    """Return from which ranks each rank takes what it wants."""
    return [
        [piece.source for step in plan(held, wanted, rank, 100) for piece in step.receives + step.copies]
        for rank in range(len(held))
    ]
