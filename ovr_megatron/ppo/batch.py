"""One iteration's batch on this rank: responses, their samples, and packs with per-token arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ovr_megatron.data.best_fit import plan_packs
from ovr_megatron.data.packing import Pack, blank_pack, pack
from ovr_megatron.data.processing import Sample
from ovr_megatron.ppo.advantages import Ragged


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
    more or less), so that the steps of an iteration find about as many responses on each.
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
    """Prompt-and-response samples of a rank, in order, cut into packs on demand; ``arrays`` are by response.

    Args:
        samples: this rank's; none on a rank that was dealt no prompt.
        response_lengths: response tokens n of each.
        pack_tokens: of a pack, at most (one longer sample fills a pack alone).
        numbers: the number of each response among those of all ranks, which `part` goes by.
        total: responses of all ranks.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        response_lengths: Sequence[int],
        pack_tokens: int,
        numbers: Sequence[int],
        total: int,
    ):
        self.samples, self.pack_tokens = samples, pack_tokens
        self.lengths, self.numbers, self.total = list(response_lengths), list(numbers), total

    def __len__(self) -> int:
        """Return the number of responses of this rank."""
        return len(self.samples)

    def part(self, turn: int, steps: int) -> list[int]:
        """Return this rank's responses in part ``turn`` of ``steps``: every ``steps``-th one of all ranks' together.

        The rule knows nothing of the ranks, so that a step learns from the same responses in every layout.
        """
        return [i for i, number in enumerate(self.numbers) if number % steps == turn]

    def layout(self, members: Sequence[int]) -> list[list[int]]:
        """Pack the responses ``members``: return for each pack those in it, in order.

        Without members there is one empty pack: the other ranks wait for this one in every collective of a step.
        """
        if not members:
            return [[]]
        plan = plan_packs([len(self.samples[i]) for i in members], self.pack_tokens)
        return [[members[k] for k in chosen] for chosen in plan]

    def packs(self, layout: Sequence[Sequence[int]], **arrays: Ragged | None) -> list[Pack]:
        """Return the packs of ``layout``, those of ``arrays`` [n per response] that are not None beside the labels."""
        extras = {name: values for name, values in arrays.items() if values is not None}
        return [
            pack(
                [self.samples[i] for i in chosen],
                [{name: values[i].astype(np.float32) for name, values in extras.items()} for i in chosen],
            )
            if chosen
            else blank_pack(extras)
            for chosen in layout
        ]

    def unpack(self, scored: Sequence[Tensor], layout: Sequence[Sequence[int]]) -> Ragged:
        """Return per-response arrays [n] of the scored rows of packs; inverse of `packs`."""
        arrays: dict[int, np.ndarray] = {}
        for values, members in zip(scored, layout, strict=True):
            if members:  # the empty pack of a rank without responses has no rows
                cuts = np.cumsum([self.lengths[i] for i in members])[:-1]
                arrays.update(zip(members, np.split(values.double().cpu().numpy(), cuts), strict=True))
        return [arrays[i] for i in sorted(arrays)]
