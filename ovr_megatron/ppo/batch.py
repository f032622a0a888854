"""One iteration's batch on this rank: responses, their samples, and packs with per-token arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ovr_megatron.data.best_fit import plan_packs
from ovr_megatron.data.packing import Pack, pack
from ovr_megatron.data.processing import Sample
from ovr_megatron.ppo.maths import Ragged


@dataclass
class Response:
    """What the engine answered to prompt number ``prompt`` of the iteration the ``sample``-th time, and its grade.

    ``logprobs`` [n] are the engine's own, of the ``tokens`` [n], the end token included if it ``stopped``.  A prompt
    that the engine gave up has no tokens.  ``failed``: no grader came to a verdict.  ``rewarded``: the reward says
    something of the response, which is so neither of a prompt that was given up nor where the user's rule failed.
    """

    prompt: int
    sample: int
    tokens: list[int]
    logprobs: np.ndarray
    stopped: bool
    text: str
    reward: float = 0.0
    verdict: str = ""
    failed: bool = False
    rewarded: bool = True


def seeds_of(run_seed: int, iteration: int, prompt: int, count: int) -> list[int]:
    """Sampling seeds of a prompt's responses, a function of these numbers alone; consecutive, below 2^31."""
    first = int(np.random.SeedSequence([run_seed, iteration, prompt]).generate_state(1)[0]) >> 2
    return list(range(first, first + count))


def deal(costs: dict[int, int], ranks: int) -> dict[int, int]:
    """Which of ``ranks`` gets each item, so that their costs are as even as greedy choice makes them.

    The dearest first, each to the rank of the lowest sum so far, but every rank gets the same number of items (or one
    more or less): the steps of an iteration are cut by numbers of responses.
    """
    room = -(-len(costs) // ranks)
    full = len(costs) - (room - 1) * ranks  # ranks that may get one item more than the others
    sums, numbers = [0] * ranks, [0] * ranks
    owner = {}
    for item in sorted(costs, key=lambda i: (-costs[i], i)):
        open_ = [r for r in range(ranks) if numbers[r] < room - 1 or (numbers[r] < room and full > 0)]
        rank = min(open_, key=lambda r: (sums[r], r))
        full -= numbers[rank] == room - 1
        numbers[rank] += 1
        sums[rank] += costs[item]
        owner[item] = rank
    return owner


class Batch:
    """Prompt-and-response samples of a rank, in order, cut into packs on demand; ``arrays`` are by response."""

    def __init__(self, samples: Sequence[Sample], response_lengths: Sequence[int], pack_tokens: int):
        self.samples, self.pack_tokens = samples, pack_tokens
        self.lengths = list(response_lengths)

    def __len__(self) -> int:
        """Number of responses."""
        return len(self.samples)

    def layout(self, members: Sequence[int]) -> list[list[int]]:
        """The responses ``members`` packed: for each pack those in it, in order."""
        plan = plan_packs([len(self.samples[i]) for i in members], self.pack_tokens)
        return [[members[k] for k in chosen] for chosen in plan]

    def packs(self, layout: Sequence[Sequence[int]], **arrays: Ragged | None) -> list[Pack]:
        """Packs of ``layout`` with those of ``arrays`` [n per response] that are given laid beside their labels."""
        given = {name: values for name, values in arrays.items() if values is not None}
        return [
            pack(
                [self.samples[i] for i in chosen],
                [{name: values[i].astype(np.float32) for name, values in given.items()} for i in chosen],
            )
            for chosen in layout
        ]

    def unpack(self, found: Sequence[Tensor], layout: Sequence[Sequence[int]]) -> Ragged:
        """Per-response arrays [n] of the scored rows of packs; inverse of `packs`."""
        arrays: dict[int, np.ndarray] = {}
        for values, chosen in zip(found, layout, strict=True):
            cuts = np.cumsum([self.lengths[i] for i in chosen])[:-1]
            arrays.update(zip(chosen, np.split(values.double().cpu().numpy(), cuts), strict=True))
        return [arrays[i] for i in sorted(arrays)]
