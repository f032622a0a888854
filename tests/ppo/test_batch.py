"""How the responses of an iteration are cut into steps, and what a rank without any of them does."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from ovr_megatron.data.packing import IGNORED
from ovr_megatron.ppo.batch import Batch, balance_prompts, seeds_of
from ovr_megatron.ppo.reductions import token_weights


@given(st.lists(st.integers(1, 99), min_size=1, max_size=9), st.integers(1, 5), st.integers(1, 6), st.integers(1, 4))
def test_the_steps_are_the_same_in_every_layout(costs: list[int], group: int, steps: int, ranks: int) -> None:
    """Prompts dealt over the ranks, and all of them on one."""

    def parts(ranks: int) -> list[set[int]]:
        owner = balance_prompts(dict(enumerate(costs)), ranks)
        batches = []
        for rank in range(ranks):
            numbers = [p * group + k for p in sorted(owner) if owner[p] == rank for k in range(group)]
            batches.append(Batch([None] * len(numbers), [1] * len(numbers), 1, numbers, len(costs) * group))
        return [{b.global_indices[i] for b in batches for i in b.minibatch(turn, steps)} for turn in range(steps)]

    assert parts(ranks) == parts(1)
    assert sorted(set().union(*parts(1))) == list(range(len(costs) * group))


def test_where_steps_divide_a_group_each_takes_the_same_samples_of_every_prompt() -> None:
    """The paper's 16 responses and 4 steps."""
    batch = Batch([None] * 48, [1] * 48, 1, range(48), 48)
    assert [[i % 16 for i in batch.minibatch(turn, 4)] for turn in range(4)] == [
        [turn + k for k in (0, 4, 8, 12)] * 3 for turn in range(4)
    ]


def test_a_rank_without_responses_has_one_pack_that_counts_nothing() -> None:
    batch = Batch([], [], 100, [], 8)
    layout = batch.group_into_packs(batch.minibatch(0, 4))
    (pack,) = batch.packs(layout, advantages=[], old_logprobs=None)
    assert (pack.labels == IGNORED).all() and pack.extras.keys() == {"advantages"}
    assert batch.unpack([torch.zeros(0)], layout) == []
    sums = []
    token_weights("pack", [], layout, 1, lambda own: sums.append(own) or np.ones(3))
    np.testing.assert_array_equal(sums[0], 0)


def test_seeds_of_an_iteration_differ() -> None:
    seeds = [seed for i in range(4) for p in range(16) for seed in seeds_of(1, i, p, 8)]
    assert len(set(seeds)) == len(seeds) == 4 * 16 * 8
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seeds_of(1, 2, 3, 4) == seeds_of(1, 2, 3, 8)[:4] != seeds_of(2, 2, 3, 4)
