"""Keep responses that a round left unfinished, so that later rounds go on with them under newer weights.

The responses to a prompt stay together.  Each rank keeps some prompts, and all ranks know the queue of these prompts
(`PromptStream.unfinished`), by whose indices they are numbered.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ovr_megatron.rollout.sampling import Generation
from ovr_megatron.runtime.exchange import exchange, gather_objects


@dataclass(frozen=True)
class ResponseSoFar:
    """A response of n tokens that may not be finished.

    Attributes:
        tokens: int32 [n], the token ids; arrays, as a list takes nine times the memory.
        logprobs: float32 [n], of the engine that drew them.
        versions: int32 [n], the iteration whose weights drew each.
        stopped: whether it ended by itself.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    stopped: bool

    def __len__(self) -> int:
        """Return n."""
        return len(self.tokens)

    def cut(self, count: int) -> ResponseSoFar:
        """Return the first ``count`` tokens; a response that has more has not stopped after these."""
        if len(self) <= count:
            return self
        return ResponseSoFar(self.tokens[:count], self.logprobs[:count], self.versions[:count], stopped=False)

    def extend(self, generation: Generation, version: int) -> ResponseSoFar:
        """Return the response with the tokens that weights of iteration ``version`` have drawn after it."""
        new_versions = np.full(len(generation.tokens), version, np.int32)
        return ResponseSoFar(
            np.concatenate([self.tokens, np.array(generation.tokens, np.int32)]),
            np.concatenate([self.logprobs, generation.logprobs]),
            np.concatenate([self.versions, new_versions]),
            generation.stopped,
        )


def empty_response() -> ResponseSoFar:
    """Return a response of no tokens."""
    return ResponseSoFar(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int32), stopped=False)


@dataclass(frozen=True)
class UnfinishedGroup:
    """All responses to a prompt, in order, and the tokens of the prompt, which the length limit counts, too."""

    prompt_tokens: int
    responses: list[ResponseSoFar]

    @property
    def tokens(self) -> int:
        """Return the tokens of all responses together."""
        return sum(map(len, self.responses))

    @property
    def oldest(self) -> int:
        """Return the version of the oldest token of all responses, of which at least one has a token."""
        return min(int(response.versions[0]) for response in self.responses if len(response))

    def cut(self, limit: int) -> UnfinishedGroup:
        """Return the group with each response within ``limit`` tokens of prompt and response together.

        A response may be longer than the curriculum allows now.
        """
        return UnfinishedGroup(self.prompt_tokens, [r.cut(limit - self.prompt_tokens) for r in self.responses])

    def unfinished(self, limit: int) -> list[int]:
        """Return the indices of the responses that go on under ``limit``, which may be higher than it was."""
        response_limit = limit - self.prompt_tokens
        return [
            k for k, response in enumerate(self.responses) if not response.stopped and len(response) < response_limit
        ]


class GroupState(NamedTuple):
    """What all ranks must know of a group: the version of its oldest token, and whether all responses are finished."""

    oldest: int
    is_complete: bool


class UnfinishedResponses:
    """The groups that this rank keeps, by their prompt's index in the queue of unfinished prompts."""

    def __init__(self) -> None:
        self.groups: dict[int, UnfinishedGroup] = {}

    def states(self, limit: int, responses: int) -> dict[int, GroupState]:
        """Return the state of the groups of all ranks under ``limit``.  A collective.

        Without those of another number of ``responses``, which a run that goes on with another setting does not use.
        """
        local_states = {}
        for position, group in self.groups.items():
            if len(group.responses) == responses:
                is_complete = not group.cut(limit).unfinished(limit)
                local_states[position] = GroupState(group.oldest, is_complete)
        states: dict[int, GroupState] = {}
        for rank_states in gather_objects(local_states):
            states |= rank_states
        return dict(sorted(states.items()))

    def send(self, ranks_of_group: Mapping[int, Iterable[int]]) -> dict[int, UnfinishedGroup]:
        """Send each group to the ranks that go on with it, and return those for this rank.  A collective.

        The groups also stay here until the round is over: a checkpoint that is saved before has them as they were.

        Args:
            ranks_of_group: by index in the queue.
        """
        outgoing: dict[int, dict[int, UnfinishedGroup]] = defaultdict(dict)
        for position, group in self.groups.items():
            for rank in ranks_of_group.get(position, ()):
                outgoing[rank][position] = group
        groups: dict[int, UnfinishedGroup] = {}
        for rank_groups in exchange(outgoing):
            groups |= rank_groups
        return groups

    def tensors(self) -> dict[str, Tensor]:
        """Return the groups as arrays for a checkpoint: none without groups.

        ``responses`` is int64 [responses, 4], for each the index of its group in the queue, the tokens of the prompt,
        n, and whether it stopped; ``tokens``, ``logprobs`` and ``versions`` are those of all responses one after the
        other.
        """
        if not self.groups:
            return {}
        table = []
        responses: list[ResponseSoFar] = []
        for position, group in sorted(self.groups.items()):
            for response in group.responses:
                table.append((position, group.prompt_tokens, len(response), response.stopped))
                responses.append(response)
        return {
            "responses": torch.tensor(table, dtype=torch.int64),
            "tokens": torch.from_numpy(np.concatenate([r.tokens for r in responses])),
            "logprobs": torch.from_numpy(np.concatenate([r.logprobs for r in responses])),
            "versions": torch.from_numpy(np.concatenate([r.versions for r in responses])),
        }

    def load(self, files: Sequence[Mapping[str, Tensor]]) -> None:
        """Replace the groups by those of `tensors`, of any number of ranks."""
        self.groups = {}
        for file in files:
            table = file["responses"].tolist()
            cuts = np.cumsum([length for _, _, length, _ in table])[:-1]
            arrays = [np.split(file[name].numpy(), cuts) for name in ("tokens", "logprobs", "versions")]
            for (position, prompt_tokens, _, stopped), tokens, logprobs, versions in zip(table, *arrays, strict=True):
                group = self.groups.setdefault(position, UnfinishedGroup(prompt_tokens, []))
                group.responses.append(ResponseSoFar(tokens, logprobs, versions, bool(stopped)))
