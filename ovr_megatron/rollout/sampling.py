"""What is sampled and what comes back: prompts, the ids that are never sampled, parameters, results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image
from vllm.logprobs import FlatLogprobs
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams

from ovr_megatron.config import Sampling
from ovr_megatron.data.pixels import Video
from ovr_megatron.errors import UserError
from ovr_megatron.families import ModelShape, family_of

# vLLM must sample a token; the prompt's log-probabilities are what is wanted.
SCORING = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, flat_logprobs=True)


class RolloutError(UserError, ValueError):
    """A rollout that cannot be set up or whose result cannot be used; the message says what to change."""


@dataclass(frozen=True)
class Prompt:
    """One prompt and how often to answer it.

    Attributes:
        tokens: Ids with one placeholder for each image or video; the engine expands them.
        images: Pictures in the order of their placeholders.
        videos: Videos, frames and metadata, in the order of theirs.
        seeds: One for each response.  A response depends on the weights, the prompt and its own seed alone, up
            to rounding.  Consecutive seeds (s, s + 1, ...) share one request and are faster.
        sampling: How the responses are sampled.
        response: Ids of a response so far, after the prompt; what is sampled goes on from there.
        enough: So many responses are enough, those that are finished first and of one step those of the first seeds;
            the others are given up.  All where it is 0; only of consecutive seeds.
    """

    tokens: Sequence[int]
    images: Sequence[Image.Image] = ()
    videos: Sequence[Video] = ()
    seeds: Sequence[int] = (0,)
    sampling: Sampling = field(default_factory=Sampling)
    response: Sequence[int] = ()
    enough: int = 0


@dataclass(frozen=True)
class Generation:
    """One response of n tokens; of a prompt that has a response so far, the tokens after it.

    Attributes:
        tokens: n sampled ids, with the end token if the model gave one.
        logprobs: float32[n], log_softmax(masked logits / temperature) at the sampled ids; of a greedy response at
            temperature 1.
        stopped: Whether it ended by itself: an end token or a stop string, not the length limit.
        prompt_tokens: The prompt as the engine saw it, placeholders expanded, with the response so far.
    """

    tokens: list[int]
    logprobs: np.ndarray
    stopped: bool
    prompt_tokens: list[int] = field(repr=False)


def end_tokens(shape: ModelShape, tokenizer: Any) -> list[int]:
    """Return the ids that end a response: those of the end of a turn and of a text.

    Raises:
        RolloutError: the tokenizer has no such token.
    """
    family = family_of(shape)
    vocabulary = tokenizer.get_vocab()
    for token in family.tokens.ends:
        if token not in vocabulary:
            raise RolloutError(f"the tokenizer of {tokenizer.name_or_path} lacks {token}; it is not {family.title}'s")
    return [vocabulary[token] for token in family.tokens.ends]


def banned_tokens(shape: ModelShape, tokenizer: Any) -> list[int]:
    """Return the ids below ``shape.vocab`` that are never sampled, ascending.

    They are the placeholders of images and videos, every other added special token except the end tokens, and ids
    that the tokenizer does not know.

    Raises:
        RolloutError: the tokenizer lacks an end token.
    """
    # The head has rows past the tokenizer's last id, which stand for no text.
    unknown = set(range(shape.vocab)) - set(tokenizer.get_vocab().values())
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    visual = {
        shape.image_token,
        shape.video_token,
        shape.vision_start_token,
        shape.vision_end_token,
    }
    ends = set(end_tokens(shape, tokenizer))
    banned = (unknown | special | visual) - ends
    return sorted(i for i in banned if i < shape.vocab)


def sampling_params(prompt: Prompt, end_ids: Sequence[int], stop: Sequence[str]) -> list[SamplingParams]:
    """Return one request for each run of consecutive seeds; vLLM gives sample i of a request the seed ``seed + i``.

    Nothing is left to the model folder or to vLLM's idea of the end of a text.
    """
    sampling = prompt.sampling
    runs = _runs(prompt.seeds)
    if not sampling.temperature:  # greedy requests are single
        runs = ((seed, 1) for seed in prompt.seeds)
    return [
        SamplingParams(
            n=count,
            seed=first,
            temperature=sampling.temperature,
            top_p=1.0,
            repetition_penalty=1.0,
            max_tokens=sampling.max_tokens,
            ignore_eos=True,
            stop_token_ids=[] if sampling.endless else list(end_ids),
            stop=[] if sampling.endless else list(stop),
            detokenize=bool(stop),
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
        )
        for first, count in runs
    ]


def _runs(seeds: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the maximal runs of consecutive seeds, as (first, length)."""
    cuts = [0]
    for k in range(1, len(seeds)):
        if seeds[k] != seeds[k - 1] + 1:
            cuts.append(k)
    cuts.append(len(seeds))
    for start, end in pairwise(cuts):
        if end > start:  # without seeds there is no run
            yield seeds[start], end - start


def generations(output: RequestOutput) -> list[Generation]:
    """Return the responses of one finished request, in the order of its samples.

    Raises:
        RolloutError: vLLM gave a request up.
    """
    prompt_tokens = list(output.prompt_token_ids or [])
    responses = []
    for sample in output.outputs:
        if sample.finish_reason not in ("stop", "length"):
            raise RolloutError(
                f"vLLM ended a request of {len(prompt_tokens)} prompt tokens with {sample.finish_reason!r}; its log "
                "says why"
            )
        stopped = sample.finish_reason == "stop"
        responses.append(generation_of(list(sample.token_ids), sample.logprobs, stopped, list(prompt_tokens)))
    return responses


def generation_of(tokens: list[int], logprobs: Any, stopped: bool, prompt_tokens: list[int]) -> Generation:
    """Return a response of ``tokens`` with vLLM's own record of their log-probabilities."""
    assert logprobs is not None and logprobs.token_ids == tokens, "log-probabilities of other tokens"
    return Generation(tokens, np.array(logprobs.logprobs, np.float32), stopped, prompt_tokens)


def prompt_logprobs(output: RequestOutput) -> np.ndarray:
    """Return the log-probabilities of a prompt's tokens but the first, from a finished request of `SCORING`.

    Returns:
        float32[n - 1] of a prompt of n tokens.

    Raises:
        RolloutError: vLLM gave the request up.
    """
    logprobs = output.prompt_logprobs
    tokens = output.prompt_token_ids or []
    if logprobs is None:
        raise RolloutError(f"vLLM gave no log-probabilities of a prompt of {len(tokens)} tokens; its log says why")
    assert isinstance(logprobs, FlatLogprobs) and logprobs.token_ids == tokens[1:], "log-probabilities of other tokens"
    return np.array(logprobs.logprobs, np.float32)
