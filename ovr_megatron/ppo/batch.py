"""One iteration's batch on this rank: responses, their samples, and packs with per-token arrays."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

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


@dataclass
class PassWork:
    """The documents that a pass over a batch computes, and their images.

    Attributes:
        lengths: rows of each document.
        prefixes: rows of the shared prompt that each attends to before its own.
        grids: frames, height and width in patches of each image or video.
    """

    lengths: list[int] = field(default_factory=list)
    prefixes: list[int] = field(default_factory=list)
    grids: list[list[int]] = field(default_factory=list)

    def add(self, length: int, prefix: int, grid_thw: np.ndarray) -> None:
        """Add a document."""
        self.lengths.append(length)
        self.prefixes.append(prefix)
        self.grids += grid_thw.tolist()


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


def group_by_prompt(responses: Iterable[Response]) -> dict[int, list[Response]]:
    """Group responses by the index of their prompt."""
    groups: dict[int, list[Response]] = defaultdict(list)
    for r in responses:
        groups[r.prompt].append(r)
    return groups


class Batch:
    """The prompt-and-response samples of a rank, in order; it cuts them into minibatches and packs.

    Args:
        samples: this rank's; none on a rank that has no prompt.
        response_lengths: response tokens n of each.
        pack_tokens: of a pack, at most (one longer sample fills a pack alone).
        global_indices: the index of each response among those of all ranks, which `minibatch` goes by.
        total: responses of all ranks.
        prompts: the prompt of each, which the responses of a pack share; None: each has its own rows of it.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        response_lengths: Sequence[int],
        pack_tokens: int,
        global_indices: Sequence[int],
        total: int,
        prompts: Sequence[int] | None = None,
    ):
        self.samples = samples
        self.pack_tokens = pack_tokens
        self.lengths = list(response_lengths)
        self.global_indices = list(global_indices)
        self.total = total
        self.prompts = prompts

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
        bundles = [[i] for i in members]
        if self.prompts is not None:
            bundles = self._bundle_by_prompt(members)
        pack_members = []
        for positions in plan_packs([self._rows(bundle) for bundle in bundles], self.pack_tokens):
            pack_members.append(list(chain.from_iterable(bundles[position] for position in positions)))
        return pack_members

    def _bundle_by_prompt(self, members: Sequence[int]) -> list[list[int]]:
        """Return the responses to each prompt in bundles, each of them as long as a pack at most."""
        assert self.prompts is not None
        bundles: list[list[int]] = []
        bundle_of_prompt: dict[int, list[int]] = {}
        for i in members:
            bundle = bundle_of_prompt.get(self.prompts[i])
            if bundle is None or self._rows([*bundle, i]) > self.pack_tokens:
                bundle = []
                bundles.append(bundle)
                bundle_of_prompt[self.prompts[i]] = bundle
            bundle.append(i)
        return bundles

    def _rows(self, bundle: Sequence[int]) -> int:
        """Return the rows of a pack that the responses ``bundle`` to one prompt take."""
        first = bundle[0]
        # The last token of the prompt, which predicts the first of the response, is a row of each.
        return len(self.samples[first]) + sum(self.lengths[i] + 1 for i in bundle[1:])

    def work(self) -> PassWork:
        """Return what one pass over the batch computes."""
        work = PassWork()
        for members in self.group_into_packs(range(len(self))):
            counts = Counter(self.prompts[i] for i in members) if self.prompts is not None else Counter()
            computed = set()
            for i in members:
                sample = self.samples[i]
                rows = len(sample)
                prompt = self.prompts[i] if self.prompts is not None else -1
                if counts[prompt] < 2:
                    work.add(rows, 0, sample.grid_thw)
                    continue
                prefix_rows = rows - self.lengths[i] - 1
                if prompt not in computed:
                    computed.add(prompt)
                    work.add(prefix_rows, 0, sample.grid_thw)
                work.add(rows - prefix_rows, prefix_rows, sample.grid_thw[:0])
        return work

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
            prompts = None if self.prompts is None else [self.prompts[i] for i in members]
            packs.append(pack(samples, extras, prompts))
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
