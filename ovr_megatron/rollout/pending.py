"""The requests that vLLM works on: which prompts they are of, and how far their responses are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer
from vllm.v1.engine.output_processor import RequestState
from vllm.v1.engine.parallel_sampling import ParentRequest

from ovr_megatron.rollout.sampling import Generation, Prompt, RolloutError, generation_of, generations

SampleKey = tuple[int, int]  # a prompt's number and the index of one of its seeds


class PendingPrompts:
    """Prompts that vLLM works on; one whose seeds are not consecutive is several requests."""

    def __init__(self) -> None:
        self._prompt_of_request: dict[str, int] = {}
        self._first_seed: dict[str, int] = {}  # of each request, the index of its first seed
        self._generations: dict[int, dict[str, list[Generation]]] = {}  # of each prompt, by request
        self._seed_counts: dict[int, int] = {}
        self._first_finished: dict[str, FirstFinished] = {}  # of each request that does not need all of its seeds

    def __bool__(self) -> bool:
        """Whether any prompt is pending."""
        return bool(self._seed_counts)

    def request_ids(self) -> list[str]:
        """Return the requests that vLLM has not finished."""
        return list(self._prompt_of_request)

    def add(self, index: int, prompt: Prompt, requests: Sequence[tuple[str, int]]) -> None:
        """Record that prompt ``index`` went to vLLM as ``requests``, each an id and the number of its seeds."""
        first_seed = 0
        self._generations[index] = {}
        for request_id, seeds in requests:
            public_id = public(request_id)
            self._prompt_of_request[public_id] = index
            self._generations[index][public_id] = []
            self._first_seed[public_id] = first_seed
            first_seed += seeds
        self._seed_counts[index] = len(prompt.seeds)
        if prompt.enough:
            assert len(requests) == 1, "only the responses of one request are told apart by when they are finished"
            self._first_finished[public_id] = FirstFinished(prompt.enough)

    def finish(
        self,
        output: RequestOutput,
        on_result: Callable[[int, list[Generation]], None],
        failed: list[tuple[int, str]],
    ) -> None:
        """Store a finished request; call ``on_result`` with the responses of its prompt if it was the last of them.

        Of a prompt with several requests the first failure goes to ``failed``; its other requests are then ignored.
        """
        index = self._prompt_of_request.pop(output.request_id)
        if index not in self._seed_counts:
            return
        if first := self._first_finished.pop(output.request_id, None):
            first.add(output.outputs)
            output = first.select(output)
        by_request = self._generations[index]
        try:
            by_request[output.request_id] = generations(output)
        except RolloutError as error:
            failed.append((index, str(error)))
            del self._seed_counts[index]
            return
        if all(by_request.values()):
            del self._seed_counts[index]
            responses: list[Generation] = []
            for request_generations in self._generations.pop(index).values():
                responses += request_generations
            on_result(index, responses)

    def finish_early(self, parents: Iterable[ParentRequest], states: Mapping[str, RequestState]) -> list[RequestOutput]:
        """Return the output of each request that has enough finished responses since the last step, but not all.

        Args:
            parents: vLLM's record of unfinished requests of several seeds.
            states: Its record of their unfinished samples, by id.
        """
        if not self._first_finished:
            return []
        outputs = []
        for parent in parents:
            first = self._first_finished.get(parent.external_req_id)
            if first is None:
                continue
            first.add(parent.output_aggregator)
            if first.is_enough:
                prompt_tokens = states[next(iter(parent.child_requests))].prompt_token_ids
                samples = list(parent.output_aggregator)
                outputs.append(RequestOutput(parent.external_req_id, None, prompt_tokens, None, samples, finished=True))
        return outputs

    def token_counts(self, states: Iterable[RequestState]) -> dict[SampleKey, int]:
        """Return the tokens so far of each unfinished response, from vLLM's ``states`` of its requests."""
        counts = {}
        for state in states:
            key = self._key(state)
            if key is not None:
                assert state.detokenizer is not None
                counts[key] = state.detokenizer.num_output_tokens()
        return counts

    def responses_so_far(self, states: Iterable[RequestState]) -> dict[SampleKey, Generation]:
        """Return the responses to the pending prompts as far as they are, finished or not; none without a token."""
        responses: dict[SampleKey, Generation] = {}
        for index in self._seed_counts:
            for request_id, request_generations in self._generations[index].items():
                for sample, generation in enumerate(request_generations):
                    responses[index, self._first_seed[request_id] + sample] = generation
        for state in states:
            key = self._key(state)
            if key is None:
                continue
            if state.parent_req is not None:
                # vLLM holds the finished samples of a request until the last of them is finished.
                self._add_finished(responses, state, state.parent_req.output_aggregator)
            assert state.detokenizer is not None and state.logprobs_processor is not None
            tokens = list(state.detokenizer.output_token_ids)
            if tokens:
                prompt_tokens = list(state.prompt_token_ids or [])
                responses[key] = generation_of(tokens, state.logprobs_processor.logprobs, False, prompt_tokens)
        return responses

    def _key(self, state: RequestState) -> SampleKey | None:
        """Return prompt and seed of a request's sample; None of a prompt that is no longer pending."""
        index = self._prompt_of_request.get(state.external_req_id)
        if index is None or index not in self._seed_counts:
            return None
        return index, self._first_seed[state.external_req_id] + state.request_index

    def _add_finished(
        self,
        responses: dict[SampleKey, Generation],
        state: RequestState,
        outputs: Sequence[CompletionOutput | None],
    ) -> None:
        """Add the finished samples among ``outputs`` of the request that ``state`` is of."""
        index = self._prompt_of_request[state.external_req_id]
        first_seed = self._first_seed[state.external_req_id]
        for output in outputs:
            if output is None or output.finish_reason not in ("stop", "length"):
                continue
            key = index, first_seed + output.index
            if key not in responses:
                prompt_tokens = list(state.prompt_token_ids or [])
                stopped = output.finish_reason == "stop"
                responses[key] = generation_of(list(output.token_ids), output.logprobs, stopped, prompt_tokens)


class FirstFinished:
    """The samples of a request in the order in which they are finished, and of one step in their own.

    Attributes:
        enough: So many are taken.
    """

    def __init__(self, enough: int) -> None:
        self.enough = enough
        self._order: list[int] = []

    def add(self, outputs: Sequence[CompletionOutput | None]) -> None:
        """Add those of ``outputs`` that have been finished since the step before; None is not finished."""
        for sample, output in enumerate(outputs):
            if output is not None and output.finish_reason in ("stop", "length") and sample not in self._order:
                self._order.append(sample)

    @property
    def is_enough(self) -> bool:
        """Whether enough are finished."""
        return len(self._order) >= self.enough

    def select(self, output: RequestOutput) -> RequestOutput:
        """Leave the first finished samples alone in ``output``, in the order of their seeds."""
        if self.is_enough:
            output.outputs = [output.outputs[sample] for sample in sorted(self._order[: self.enough])]
        return output


def public(request_id: str) -> str:
    """Return a request's id without the letters that vLLM appends to it inside; its outputs carry the id without."""
    return request_id.partition("-")[0]


def continue_text(state: RequestState, tokens: Sequence[int], stop: Sequence[str]) -> None:
    """Have vLLM look for ``stop`` also across the begin of a request that continues the response ``tokens``.

    vLLM decodes a request's own tokens alone: of a text that begins in the tokens before it would see the end only.
    """
    detokenizer = state.detokenizer
    assert isinstance(detokenizer, FastIncrementalDetokenizer)
    # A stream of its own: one that begins with a prompt which ends within a character would give all of its text.
    detokenizer.stream = type(detokenizer.stream)(skip_special_tokens=detokenizer.skip_special_tokens)
    longest = max(map(len, stop))
    # A character is at most four bytes, and each byte may be a token.
    for token in tokens[-4 * longest :]:
        detokenizer.output_text += detokenizer.decode_next(token)
