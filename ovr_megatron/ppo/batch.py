"""One iteration's batch on this rank: responses, their samples, and packs with per-token arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ovr_megatron.data.best_fit import plan_packs
from ovr_megatron.data.packing import Pack, blank_pack, pack
from ovr_megatron.data.samples import Sample
from ovr_megatron.ppo.advantages import Ragged
from ovr_megatron.runtime.balance import balance


@dataclass
class Response:
    """A response that the rollout engine sampled, and its grade.

    Attributes:
        prompt: index of its prompt in the iteration.
        sample: index among the responses to this prompt.
        tokens: n token ids, the end token included where the response ``stopped``; none of a prompt that was given up.
        logprobs: float32 [n], the engine's own log-probabilities of ``tokens``.
        stopped: whether it ended by itself, before the length limit.
        text: the decoded tokens.
        reward: of the grader.
        verdict: why it has this reward, for people to read.
        failed: whether no grader came to a verdict.
        rewarded: whether ``reward`` says anything about the response.  False where the prompt was given up and where
            the user's own rule failed.
        versions: int32 [n], the iteration whose weights drew each token; None: the current ones drew all of them.
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
    versions: np.ndarray | None = None


def seeds_of(run_seed: int, iteration: int, prompt: int, count: int) -> list[int]:
    """Return ``count`` sampling seeds for a prompt, a function of these numbers alone; consecutive, below 2^31."""
    sequence = np.random.SeedSequence([run_seed, iteration, prompt])
    state = sequence.generate_state(1)
    # 30 of the 32 bits, so that the last of the consecutive seeds stays below 2^31.
    first = int(state[0]) >> 2
    return list(range(first, first + count))


def balance_prompts(costs: dict[int, int], ranks: int) -> dict[int, int]:
    """Balance prompts over ``ranks`` by cost; return the rank of each prompt.

    Every rank gets the same number of prompts, or one fewer, so that the steps of an iteration find about as many
    responses on each.

    Args:
        costs: tokens of each prompt with its responses, by index of the prompt; the same on all ranks.
        ranks: data-parallel size.
    """
    prompts = sorted(costs)  # so that of equal prompts all ranks place the one of the lower index first
    prompt_costs = [costs[prompt] for prompt in prompts]
    shares = balance(prompt_costs, ranks, equal_counts=True)
    rank_of_prompt: dict[int, int] = {}
    for rank, share in enumerate(shares):
        for i in share:
            rank_of_prompt[prompts[i]] = rank
    return rank_of_prompt


class Batch:
    """The prompt-and-response samples of a rank, in order; it cuts them into minibatches and packs.

    Args:
        samples: this rank's; none on a rank that has no prompt.
        response_lengths: response tokens n of each.
        pack_tokens: of a pack, at most (one longer sample fills a pack alone).
        global_indices: the index of each response among those of all ranks, which `minibatch` goes by.
        total: responses of all ranks.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        response_lengths: Sequence[int],
        pack_tokens: int,
        global_indices: Sequence[int],
        total: int,
    ):
        self.samples = samples
        self.pack_tokens = pack_tokens
        self.lengths = list(response_lengths)
        self.global_indices = list(global_indices)
        self.total = total

    def __len__(self) -> int:
        """Return the number of responses of this rank."""
        return len(self.samples)

    def minibatch(self, step: int, steps: int) -> list[int]:
        """Return this rank's responses in optimizer step ``step`` of ``steps``: every ``steps``-th one of all ranks'.

        The rule does not depend on the ranks, so that a step learns from the same responses in every layout.
        """
        members = []
        for i, global_index in enumerate(self.global_indices):
            if global_index % steps == step:
                members.append(i)
        return members

    def group_into_packs(self, members: Sequence[int]) -> list[list[int]]:
        """Distribute the responses ``members`` over packs; return the responses of each pack, in order.

        Without members there is one empty pack: the other ranks wait for this one in every collective of a step.
        """
        if not members:
            return [[]]
        sample_lengths = [len(self.samples[i]) for i in members]
        pack_members = []
        for positions in plan_packs(sample_lengths, self.pack_tokens):
            pack_members.append([members[position] for position in positions])
        return pack_members

    def packs(self, pack_members: Sequence[Sequence[int]], **arrays: Ragged | None) -> list[Pack]:
        """Build the packs of `group_into_packs`.

        Args:
            pack_members: the responses of each pack; those of an empty pack are replaced by a pack without labels.
            arrays: float [n] of each response of this rank, which the packs carry as float32 beside their labels; those
                that are None are left out.
        """
        present = {name: values for name, values in arrays.items() if values is not None}
        packs = []
        for members in pack_members:
            if not members:
                packs.append(blank_pack(present))
                continue
            samples = [self.samples[i] for i in members]
            extras = []
            for i in members:
                response_arrays = {}
                for name, values in present.items():
                    response_arrays[name] = values[i].astype(np.float32)
                extras.append(response_arrays)
            packs.append(pack(samples, extras))
        return packs

    def unpack(self, scored: Sequence[Tensor], pack_members: Sequence[Sequence[int]]) -> Ragged:
        """Cut the scored rows of each pack into float64 arrays [n] by response; the inverse of `packs`."""
        arrays: dict[int, np.ndarray] = {}
        for values, members in zip(scored, pack_members, strict=True):
            if not members:  # the empty pack of a rank without responses has no rows
                continue
            lengths = [self.lengths[i] for i in members]
            cuts = np.cumsum(lengths)[:-1]
            pack_values = values.double().cpu().numpy()  # float64, as advantages are computed in it
            arrays.update(zip(members, np.split(pack_values, cuts), strict=True))
        # In the order of the responses, which is not that of the packs.
        return [arrays[i] for i in sorted(arrays)]
