"""Responses that go on: interrupted in the middle, prefilled again, sampled from there as if nothing had been."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from ovr_megatron.config import ParallelConfig, RolloutConfig
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.rollout.sampling import Generation
from ovr_megatron.runtime import distributed

CLOSE = 3e-5
MAX_MODEL_LEN = 320


@pytest.fixture(scope="module")
def references(make_reference):
    """Two models of one shape with different weights."""
    return [make_reference(True, 1), make_reference(True, 2)]


@pytest.fixture(scope="module")
def started(references, processor):
    distributed.start(ParallelConfig(), seed=5)
    config = RolloutConfig(max_num_seqs=40)
    return RolloutEngine(references[0].folder, config, processor, "float32", MAX_MODEL_LEN, empty=True)


@pytest.fixture
def engine(started, references):
    """The engine with the first model's weights."""
    started.update(references[0].held())
    return started


def interrupt(engine, prompts, last_step):
    """Answer until a step; return the tokens after each step, what was finished and what was not."""
    given, counts, finished, unfinished = list(enumerate(prompts)), [], {}, {}

    def take(outstanding):
        taken, given[:] = given[:], []
        return taken

    def between():
        counts.append(engine.token_counts())
        return len(counts) == last_step

    assert engine.answer(take, finished.__setitem__, between, unfinished.update) == []
    return counts, finished, unfinished


def test_an_interrupted_response_is_the_begin_of_the_entire_one(engine, samples, ask):
    """Requests of several seeds and of one; finished siblings of an unfinished response are there, too."""
    prompts = ask(samples[:3], [*range(16), 20], 40, 2.0)
    entire = engine.generate(prompts)
    counts, finished, unfinished = interrupt(engine, prompts, 24)
    for index, group in finished.items():
        assert [g.tokens for g in group] == [g.tokens for g in entire[index]]
    pending = {index for index, _ in unfinished}
    assert pending and not pending & finished.keys()
    kept = siblings = 0
    for (index, sample), part in unfinished.items():
        response = entire[index][sample]
        assert part.tokens == response.tokens[: len(part.tokens)]
        assert np.allclose(part.logprobs, response.logprobs[: len(part.tokens)], atol=CLOSE)
        is_finished = len(part.tokens) == len(response.tokens)
        assert part.stopped == (is_finished and response.stopped)
        assert counts[-1].get((index, sample), len(part.tokens)) == len(part.tokens)
        assert ((index, sample) in counts[-1]) != is_finished
        kept += not is_finished
        siblings += is_finished
    assert kept > 2 and siblings > 0
    assert not engine._llm.llm_engine.output_processor.parent_requests
    for before, after in pairwise(counts):
        assert all(after[key] >= count for key, count in before.items() if key in after)


def test_the_rest_is_sampled_under_the_new_weights(engine, references, samples, ask):
    """Text, images and videos: the old weights' log-probabilities before the update, the new ones' after it."""
    prompts = ask(samples, range(3, 9), 20)
    counts, _, unfinished = interrupt(engine, prompts, 10)
    unfinished = {key: part for key, part in unfinished.items() if key in counts[-1]}
    assert {index for index, _ in unfinished} == set(range(len(samples)))
    engine.update(references[1].held())
    numbers = [index for index, _ in unfinished]
    parts = list(unfinished.values())
    rest = [replace(prompts[i], seeds=[5], response=part.tokens) for i, part in zip(numbers, parts, strict=True)]
    continued = [group[0] for group in engine.generate(rest)]
    entire = [joined(part, g) for part, g in zip(parts, continued, strict=True)]
    chosen = [samples[i] for i in numbers]
    for number, (part, response) in enumerate(zip(parts, entire, strict=True)):
        scores = [
            reference.logprobs(chosen[number], response.tokens, engine.banned, 1.0).numpy() for reference in references
        ]
        tokens = np.arange(len(response.tokens)), response.tokens
        old, new = (score[tokens] for score in scores)
        count = len(part.tokens)
        assert np.abs(old[:count] - response.logprobs[:count]).max() < CLOSE
        assert np.abs(new[count:] - response.logprobs[count:]).max() < CLOSE
        assert np.abs(old - new).max() > 1e-2


def joined(part: Generation, rest: Generation) -> Generation:
    return Generation(part.tokens + rest.tokens, np.concatenate([part.logprobs, rest.logprobs]), rest.stopped, [])


def test_a_greedy_response_goes_on_as_it_would_have(engine, samples, ask):
    prompts = ask(samples, [1], 24, 0.0)
    for prompt, (response,) in zip(prompts, engine.generate(prompts), strict=True):
        for count in (1, 9, len(response.tokens) - 1):
            [(rest,)] = engine.generate([replace(prompt, response=response.tokens[:count])])
            room = 24 - count
            assert rest.tokens[:room] == response.tokens[count:][:room]
            assert np.allclose(rest.logprobs[:room], response.logprobs[count:][:room], atol=CLOSE)


def test_a_stop_string_may_lie_across_the_interruption(engine, processor, samples, ask, monkeypatch):
    """It ends a greedy response with the same token wherever that was interrupted."""
    prompts = ask(samples, [1], 16, 0.0)
    crossed = 0
    for prompt, (free,) in zip(prompts, engine.generate(prompts), strict=True):
        texts = [processor.decode(free.tokens[:count]) for count in range(len(free.tokens) + 1)]
        for end in range(4, len(free.tokens)):
            stop = texts[end][max(len(texts[end - 2]) - 1, 0) :]
            if "\ufffd" in texts[end] + texts[end - 1] + texts[end - 2] or stop in texts[end - 1]:
                continue
            monkeypatch.setattr(engine, "_stop", ["never in a text", stop])
            [(response,)] = engine.generate([prompt])
            assert response.stopped and response.tokens == free.tokens[:end]
            for count in range(1, end):
                [(rest,)] = engine.generate([replace(prompt, response=free.tokens[:count])])
                assert rest.stopped and rest.tokens == free.tokens[count:end], (stop, count, end)
                crossed += 1
            break
        monkeypatch.setattr(engine, "_stop", [])
    assert crossed > 5


def test_the_first_finished_responses_are_enough(engine, samples, ask):
    """Of all that start: those with the fewest tokens, of equal ones the first seeds; the others leave no trace."""
    prompts = ask(samples[:2], range(20), 40, 2.0)
    entire = engine.generate(prompts)
    for enough in (1, 3, 20):
        chosen = engine.generate([replace(prompt, enough=enough) for prompt in prompts])
        for group, everything in zip(chosen, entire, strict=True):
            order = sorted(range(20), key=lambda k: (len(everything[k].tokens), k))[:enough]
            assert [g.tokens for g in group] == [everything[k].tokens for k in sorted(order)]
            assert all(g.prompt_tokens == everything[0].prompt_tokens for g in group)
    processor = engine._llm.llm_engine.output_processor
    assert not processor.parent_requests and not processor.request_states
    engine.sleep()  # refuses where requests still hold the cache
