"""Which ids may be sampled, and how seeds become requests."""

from types import SimpleNamespace

import numpy as np
import pytest

from ovr_megatron.config import Sampling
from ovr_megatron.rollout.sampling import Prompt, RolloutError, banned_tokens, end_tokens, generations, sampling_params

SPECIAL_BUT_THE_ENDS = (
    "<|im_start|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> <|quad_end|> "
    "<|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()


def test_banned_are_special_tokens_and_ids_past_the_tokenizer(processor):
    banned = banned_tokens(processor.shape, processor.tokenizer)
    ids = processor.tokenizer.convert_tokens_to_ids
    past = list(range(len(processor.tokenizer), processor.shape.vocab))
    assert past and banned == sorted([*map(ids, SPECIAL_BUT_THE_ENDS), *past])
    assert end_tokens(processor.shape, processor.tokenizer) == [ids("<|im_end|>"), ids("<|endoftext|>")]


def test_tokenizer_without_an_end_token_is_refused(processor):
    stranger = SimpleNamespace(name_or_path="gpt", get_vocab=lambda: {"<|endoftext|>": 0})
    with pytest.raises(RolloutError, match=r"tokenizer of gpt lacks <\|im_end\|>"):
        end_tokens(processor.shape, stranger)


@pytest.mark.parametrize(
    ("seeds", "temperature", "requests"),
    [
        ([5, 6, 7], 1.0, [(5, 3)]),
        ([5, 6, 9, 8, 9, 2], 1.0, [(5, 2), (9, 1), (8, 2), (2, 1)]),
        ([0, 1], 0.0, [(0, 1), (1, 1)]),  # vLLM refuses several greedy samples of one request
        ([], 1.0, []),
    ],
)
def test_consecutive_seeds_share_a_request(seeds, temperature, requests):
    found = sampling_params(Prompt([1], seeds=seeds, sampling=Sampling(temperature)), [3], [])
    assert [(params.seed, params.n) for params in found] == requests


def test_nothing_is_inherited_from_the_model_folder():
    (params,) = sampling_params(Prompt([1], sampling=Sampling(0.7, 9)), [3, 4], ["User:"])
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.max_tokens) == (0.7, 1.0, 0, 0.0, 9)
    assert (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) == (1.0, 0.0, 0.0)
    assert (params.ignore_eos, params.stop_token_ids, params.stop) == (True, [3, 4], ["User:"])


def request_output(finish_reason):
    logprobs = SimpleNamespace(token_ids=[7, 3], logprobs=[-0.5, -1.5])
    sample = SimpleNamespace(token_ids=[7, 3], logprobs=logprobs, finish_reason=finish_reason)
    return SimpleNamespace(prompt_token_ids=[1, 2], outputs=[sample])


def test_finish_reasons():
    (stopped,), (cut,) = generations(request_output("stop")), generations(request_output("length"))
    assert (stopped.stopped, cut.stopped) == (True, False)
    assert stopped.tokens == [7, 3] and stopped.prompt_tokens == [1, 2]
    np.testing.assert_array_equal(stopped.logprobs, np.array([-0.5, -1.5], np.float32))
    with pytest.raises(RolloutError, match="2 prompt tokens with 'abort'"):
        generations(request_output("abort"))
