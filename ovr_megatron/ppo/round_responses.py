"""Put the responses of a round together: what earlier rounds left of them, and what the engine adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ovr_megatron.ppo.unfinished import ResponseSoFar, UnfinishedGroup, empty_response
from ovr_megatron.rollout.pending import SampleKey
from ovr_megatron.rollout.sampling import Generation, Prompt


class RoundResponses:
    """The responses of this rank's engine in a round.

    The engine gets requests: one for all responses to a prompt that begin, and one for each response that goes on, as
    its prompt is longer by the tokens so far.  They are numbered in the order in which they are made.
    """

    def __init__(self, responses: int, version: int, groups: Mapping[int, UnfinishedGroup]) -> None:
        """Begin a round.

        Args:
            responses: Of each prompt.
            version: That of the tokens that the engine adds.
            groups: What earlier rounds left of the prompts that this engine goes on with, by index of the prompt,
                within the length limit of this round.
        """
        self._count = responses
        self._version = version
        self._groups = dict(groups)
        self._requests: list[tuple[int, list[int]]] = []  # prompt and samples of each
        self._missing: dict[int, set[int]] = {}  # of a prompt that the engine works on, the samples without an end
        self._generations: dict[tuple[int, int], Generation] = {}  # by prompt and sample

    def requests(self, prompt: int, template: Prompt, limit: int, prompt_tokens: int) -> list[tuple[int, Prompt]]:
        """Return the numbered requests for what is missing of the responses to ``prompt``.

        Args:
            prompt: Its index.
            template: As if all responses began, with a seed for each.
            limit: Most tokens of the prompt and a response together.
            prompt_tokens: Of the prompt, placeholders expanded.
        """
        if prompt not in self._groups:
            responses = [empty_response() for _ in range(self._count)]
            self._groups[prompt] = UnfinishedGroup(prompt_tokens, responses)
        group = self._groups[prompt]
        missing = group.unfinished(limit)
        self._missing[prompt] = set(missing)
        beginning: list[int] = []
        continued: list[int] = []
        for sample in missing:
            part = continued if len(group.responses[sample]) else beginning
            part.append(sample)
        requests = []
        if len(beginning) == self._count:
            # With all seeds of the template: it may have more, of which the first finished responses are taken.
            requests.append(self._number(prompt, beginning, template))
        elif beginning:
            seeds = [template.seeds[sample] for sample in beginning]
            request = replace(template, seeds=seeds)
            requests.append(self._number(prompt, beginning, request))
        for sample in continued:
            tokens = group.responses[sample].tokens.tolist()
            sampling = replace(template.sampling, max_tokens=limit - prompt_tokens - len(tokens))
            request = replace(template, seeds=[template.seeds[sample]], sampling=sampling, response=tokens)
            requests.append(self._number(prompt, [sample], request))
        return requests

    def _number(self, prompt: int, samples: list[int], request: Prompt) -> tuple[int, Prompt]:
        self._requests.append((prompt, samples))
        return len(self._requests) - 1, request

    def prompt_of(self, request: int) -> int:
        """Return the index of the prompt that a request is of."""
        return self._requests[request][0]

    def finish(self, request: int, generations: Sequence[Generation]) -> int | None:
        """Add the result of a request; return the index of its prompt if no response to it is missing now."""
        prompt, samples = self._requests[request]
        for sample, generation in zip(samples, generations, strict=True):
            self._generations[prompt, sample] = generation
        missing = self._missing[prompt]
        missing.difference_update(samples)
        return None if missing else prompt

    def interrupt(self, generations: Mapping[SampleKey, Generation]) -> None:
        """Add what the engine had of unfinished requests when the round ended, by request and index of its seed."""
        for (request, index), generation in generations.items():
            prompt, samples = self._requests[request]
            self._generations[prompt, samples[index]] = generation

    def group(self, prompt: int) -> list[ResponseSoFar]:
        """Return the responses to ``prompt`` as far as they are."""
        responses = []
        for sample, response in enumerate(self._groups[prompt].responses):
            generation = self._generations.get((prompt, sample))
            if generation is None:
                responses.append(response)
            else:
                responses.append(response.extend(generation, self._version))
        return responses

    def unfinished(self, prompts: Sequence[int], counts: Mapping[SampleKey, int]) -> dict[int, UnfinishedGroup]:
        """Return what the next round goes on with of ``prompts``, without those of another engine or without a token.

        Args:
            prompts: Those that the round leaves to the next.
            counts: By request and index of its seed, how many of the tokens that the engine added count, where the
                response was unfinished at the last step of the round: it may have more, and may have ended since.
        """
        lengths = self._lengths(counts)
        groups = {}
        for prompt in prompts:
            if prompt not in self._groups:
                continue
            responses = []
            for sample, response in enumerate(self.group(prompt)):
                length = lengths.get((prompt, sample), len(response))
                responses.append(response.cut(length))
            group = UnfinishedGroup(self._groups[prompt].prompt_tokens, responses)
            if group.tokens:
                groups[prompt] = group
        return groups

    def _lengths(self, counts: Mapping[SampleKey, int]) -> dict[tuple[int, int], int]:
        """Return the tokens of responses, by prompt and sample, of which the engine's part has so many ``counts``."""
        lengths = {}
        for (request, index), count in counts.items():
            prompt, samples = self._requests[request]
            sample = samples[index]
            earlier = len(self._groups[prompt].responses[sample])
            lengths[prompt, sample] = earlier + count
        return lengths
