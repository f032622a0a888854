import bisect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovr_megatron.data.best_fit import PackError, assign_packs, plan_packs
from ovr_megatron.runtime.balance import balance


@given(st.lists(st.integers(1, 50), max_size=200), st.integers(50, 90))
@settings(max_examples=80, deadline=None)
def test_a_plan_holds_every_document_once_and_no_pack_is_too_long(lengths, pack_tokens):
    plan = plan_packs(lengths, pack_tokens)
    assert sorted(index for members in plan for index in members) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in members) <= pack_tokens for members in plan)
    assert plan == plan_packs(lengths, pack_tokens)
    # Best fit never opens a pack in vain: no two packs could have been one.
    sums = sorted(sum(lengths[i] for i in members) for members in plan)
    assert len(sums) < 2 or sums[0] + sums[1] > pack_tokens


def test_packs_of_natural_lengths_are_97_percent_full():
    draw = np.random.default_rng(0)
    lengths = np.minimum(draw.lognormal(np.log(2500), 0.9, 3000), 32000).astype(int).tolist()
    plan = plan_packs(lengths, 65536)
    assert sum(lengths) / (len(plan) * 65536) > 0.97


def test_a_document_longer_than_a_pack_is_an_error():
    with pytest.raises(PackError, match="sample 1 has 51 tokens and does not fit into a pack of 50"):
        plan_packs([50, 51], 50)


def best_fit_by_a_sorted_list(lengths, pack_tokens):
    """Best fit as textbooks have it: the free spaces in order, the first that suffices."""
    room, assigned, packs = [], [], 0
    for length in lengths:
        at = bisect.bisect_left(room, (length, 0))
        if at == len(room):
            free, number, packs = pack_tokens, packs, packs + 1
        else:
            free, number = room.pop(at)
        assigned.append(number)
        if free > length:
            bisect.insort(room, (free - length, number))
    return assigned


@given(st.lists(st.integers(1, 1500), max_size=120), st.sampled_from([1500, 1791, 1792, 65536]))
@settings(max_examples=80, deadline=None)
def test_assignment_is_that_of_a_sorted_list(lengths, pack_tokens):
    assert assign_packs(lengths, pack_tokens).tolist() == best_fit_by_a_sorted_list(lengths, pack_tokens)


def test_costs_of_a_step_differ_by_less_than_two_percent():
    draw = np.random.default_rng(0)
    lengths = draw.lognormal(np.log(3700) - 0.5, 1.0, 30_000).clip(16, 65536).astype(int)
    costs = np.bincount(assign_packs(lengths, 65536), lengths.astype(float) ** 2)[:640]
    loads = [costs[share].sum() for share in balance(costs, 16, equal_counts=True)]
    turns = [costs[number::16].sum() for number in range(16)]  # without a look at costs
    assert max(loads) / np.mean(loads) < 1.02 < max(turns) / np.mean(turns)
