"""The rollout engine against Transformers: same tokens in, same distribution out, before and after an update."""

import dataclasses
import json
import os
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.engine.arg_utils import EngineArgs

from ovr_megatron.config import DataConfig, ParallelConfig, RolloutConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.model import heads
from ovr_megatron.model.attention import rotary_table
from ovr_megatron.model.rope import inverse_frequencies
from ovr_megatron.rl.training import warn
from ovr_megatron.rollout.engine import RolloutEngine, _settings
from ovr_megatron.rollout.model import fill_rotary_cache
from ovr_megatron.rollout.reshard import TransferError
from ovr_megatron.rollout.sampling import Prompt, RolloutError
from ovr_megatron.runtime import distributed

# float32 rounding of two implementations, divided by the temperature; the project's bound is 1e-4.
CLOSE = 3e-5
MAX_MODEL_LEN = 320


def surroundings():
    """Everything in the process that a rollout must leave alone."""
    return {
        "python": random.getstate(),
        "numpy": json.dumps(np.random.get_state(legacy=False), default=lambda array: array.tolist()),
        "torch": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "set_num_threads": torch.set_num_threads,
        "dtype": torch.get_default_dtype(),
        "affinity": os.sched_getaffinity(0),
        "environment": dict(os.environ),
    }


def changes(before):
    return [name for name, value in surroundings().items() if value != before[name]]


@pytest.fixture(scope="module")
def references(make_reference):
    """Two models with a tied head, of one shape, with different weights."""
    return [make_reference(True, 1), make_reference(True, 2)]


@pytest.fixture(scope="module")
def started(references, processor):
    """The module's engine, and what its start changed around it."""
    distributed.start(ParallelConfig(), seed=5)
    os.environ["VLLM_PLUGINS"] = "ours"  # a variable that the engine sets while it works
    before = surroundings()
    config = RolloutConfig(max_num_seqs=64)
    engine = RolloutEngine(references[0].folder, config, processor, "float32", MAX_MODEL_LEN, empty=True)
    yield SimpleNamespace(engine=engine, changed=changes(before))
    del os.environ["VLLM_PLUGINS"]


@pytest.fixture
def engine(started, references):
    """The engine with the first model's weights."""
    started.engine.update(references[0].held())
    return started.engine


def test_start_leaves_the_process_as_it_was(started):
    assert started.changed == []


def test_without_weights_nothing_is_answered(started, references, samples, ask):
    for _ in range(2):
        with pytest.raises(RolloutError, match="has no weights"):
            started.engine.generate(ask(samples, [1]))
        started.engine.update(references[0].held())
        assert started.engine.generate(ask(samples, [1], 1))
        started.engine.sleep(deep=True)


def test_generation_and_update_leave_the_process_as_it_was(engine, references, samples, ask):
    before = surroundings()
    engine.generate(ask(samples, [1]))
    engine.update(references[0].held())
    assert changes(before) == []


def test_engine_expands_prompts_like_the_trainer(engine, samples, ask):
    for sample, (generation,) in zip(samples, engine.generate(ask(samples, [1], 1)), strict=True):
        assert generation.prompt_tokens == sample.tokens.tolist()


def test_a_prompt_that_vllm_refuses_costs_itself_alone(engine, samples, ask):
    good = ask(samples, [3, 4, 9], 4)
    given = [(5, good[0]), (7, Prompt([1] * 100_000, seeds=[1])), (9, good[1])]
    found = {}
    failed = engine.answer(lambda outstanding: [given.pop(0)] if given else [], found.__setitem__)
    assert [(number, "100000" in problem) for number, problem in failed] == [(7, True)]
    assert sorted(found) == [5, 9]
    expected = engine.generate(good[:2])
    assert [[g.tokens for g in found[n]] for n in (5, 9)] == [[g.tokens for g in group] for group in expected]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_transformers_over_the_allowed_ids(engine, references, samples, ask, temperature):
    responses = engine.generate(ask(samples, [3, 4, 9], temperature=temperature))
    assert references[0].worst(samples, responses, engine.banned, temperature) < CLOSE
    assert references[0].worst(samples, responses, [], temperature) > 1e-2, "the ban must matter here"
    assert not {t for group in responses for g in group for t in g.tokens} & set(engine.banned)


def test_update_reaches_every_part_and_drops_every_cache(engine, references, samples, ask):
    engine.generate(ask(samples, [3, 4]))  # fills the caches with what the old weights computed
    engine.update(references[1].held())
    responses = engine.generate(ask(samples, [3, 4]))
    assert references[1].worst(samples, responses, engine.banned, 1.0) < CLOSE
    assert references[0].worst(samples, responses, engine.banned, 1.0) > 0.1


def test_untied_head_is_updated_and_stop_strings_stop(started, make_reference, processor, samples, ask):
    old, new = make_reference(False, 3), make_reference(False, 4)
    config = RolloutConfig(max_num_seqs=16, stop=["a"])
    engine = RolloutEngine(old.folder, config, processor, "float32", MAX_MODEL_LEN)
    engine.generate(ask(samples, [3, 4]))
    engine.update(new.held())
    responses = engine.generate(ask(samples, [3, 4], 64))
    assert new.worst(samples, responses, engine.banned, 1.0) < CLOSE
    texts = [(processor.decode(g.tokens), processor.decode(g.tokens[:-1])) for group in responses for g in group]
    stopped = [g.stopped for group in responses for g in group]
    assert any(stopped) and not any("a" in before for _, before in texts)
    assert all("a" not in text for (text, _), early in zip(texts, stopped, strict=True) if not early)


@pytest.fixture(scope="module")
def bfloat16_engine(started, references, processor):
    """An engine of the same shape with bfloat16 weights."""
    return RolloutEngine(
        references[0].folder, RolloutConfig(max_num_seqs=16), processor, "bfloat16", MAX_MODEL_LEN, empty=True
    )


def test_bfloat16_weights_have_float32_logits(bfloat16_engine, references, samples, ask):
    """The trainer's: float32 sums of bfloat16 products.  Tied to the embedding, after an update, and after a sleep."""
    shape = bfloat16_engine._llm.llm_engine.model_config.hf_config.get_text_config()
    hidden = torch.randn(9, shape.hidden_size, generator=torch.Generator().manual_seed(1)).mul(6).bfloat16()
    (model,) = bfloat16_engine._llm.apply_model(lambda model: model)
    for reference in (*references, references[0]):
        weights = [replace(one, parameter=one.parameter.bfloat16()) for one in reference.held()]
        bfloat16_engine.update(weights)
        logits = model.compute_logits(hidden)
        head = reference.model.lm_head.weight.bfloat16()
        assert logits.dtype == torch.float32
        expected = heads.float_product(hidden, head.t())
        expected[:, bfloat16_engine.banned] = -torch.inf
        allowed = expected.isfinite()
        assert torch.equal(allowed, logits.isfinite()) and expected[allowed].abs().max() > 20
        assert (logits - expected)[allowed].abs().max() < 1e-4
        responses = bfloat16_engine.generate(ask(samples, [3]))
        assert all(group[0].logprobs.dtype == np.float32 for group in responses)
        bfloat16_engine.sleep(deep=True)


def test_bfloat16_rotary_tables_are_the_trainers(bfloat16_engine, processor):
    """Bit for bit, of the language model and of the tower, at every position that vLLM has."""
    (model,) = bfloat16_engine._llm.apply_model(lambda model: model)
    head, vision = processor.shape.head_dim, processor.shape.vision
    frequencies, scaling = inverse_frequencies(processor.shape)
    size = vision.hidden // vision.heads // 2
    tower = 1.0 / 10000.0 ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    tables = {
        head: model.language_model.model.layers[0].self_attn.rotary_emb.cos_sin_cache,
        size: model.visual.rotary_pos_emb.cos_sin_cache,
    }
    for (width, theirs), inverse in zip(tables.items(), (frequencies, tower), strict=True):
        assert theirs.dtype == torch.bfloat16 and theirs.shape[1] == width
        angles = torch.arange(len(theirs))[:, None].float() * inverse
        ours = rotary_table(angles, torch.bfloat16, scaling if width == head else 1.0)[:, 0, 0]
        ours = torch.cat((ours[:, : width // 2], ours[:, width : width + width // 2]), -1)
        assert torch.equal(theirs.float(), ours)


def test_a_gpu_schedules_ahead_unless_it_is_told_not_to(monkeypatch, processor):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for ahead, expected in ((True, None), (False, False)):
        settings = _settings(RolloutConfig(async_scheduling=ahead), processor, "bfloat16", MAX_MODEL_LEN)
        assert settings["async_scheduling"] is expected
        assert settings["hf_overrides"] == {"head_dtype": "float32"}


def test_the_warning_looks_at_a_quantile(capsys):
    config = SimpleNamespace(rollout=RolloutConfig(mismatch_warning=0.05))
    warn({"rollout/mismatch_p99": 0.04, "rollout/mismatch_max": 9.0}, 3, config)
    assert capsys.readouterr().err == ""
    warn({"rollout/mismatch_p99": 0.06, "rollout/mismatch_max": 9.0}, 3, config)
    assert "iteration 3: a hundredth of the tokens' log-probabilities differ by 6.00e-02" in capsys.readouterr().err


def test_engine_keeps_a_copy_of_the_weights(engine, references, samples, ask):
    held = references[1].held()
    engine.update(held)
    before = engine.generate(ask(samples, [0], temperature=0.0))
    for one in held:
        one.parameter.zero_()
    after = engine.generate(ask(samples, [0], temperature=0.0))
    assert [g.tokens for (g,) in after] == [g.tokens for (g,) in before]


def test_incomplete_update_is_refused_and_changes_nothing(engine, references, samples, ask):
    before = engine.generate(ask(samples, [3]))
    held = references[1].held()
    incomplete = [one for one in held if one.ranges[0].tensor != "model.layers.2.mlp.down_proj.weight"]
    assert len(incomplete) == len(held) - 1
    for _ in range(2):  # the second time is no better than the first
        with pytest.raises(TransferError, match=r"no rank holds row 0 of model\.layers\.2\.mlp\.down_proj"):
            engine.update(incomplete)
    after = engine.generate(ask(samples, [3]))
    assert [g.tokens for (g,) in after] == [g.tokens for (g,) in before]
    engine.update(held)
    responses = engine.generate(ask(samples, [3]))
    assert references[1].worst(samples, responses, engine.banned, 1.0) < CLOSE


def check_greedy_tokens(engine, reference, samples, ask):
    compared = 0
    for sample, (generation,) in zip(samples, engine.generate(ask(samples, [0], 32, 0.0)), strict=True):
        expected = reference.logprobs(sample, generation.tokens, engine.banned, 1.0)
        gaps = expected.topk(2).values @ torch.tensor([1.0, -1.0])
        clear = int(torch.cumprod((gaps > 1e-4).long(), 0).sum())
        assert generation.tokens[:clear] == expected.argmax(-1)[:clear].tolist()
        compared += clear
    assert compared > 100


def test_greedy_tokens_are_those_of_transformers_up_to_a_near_tie(engine, references, samples, ask):
    check_greedy_tokens(engine, references[0], samples, ask)


def test_responses_do_not_depend_on_company_but_for_near_ties(engine, references, samples, ask):
    """Other batches round differently.  Where two responses part, the two tokens had drawn the same to 1e-4.

    A request's own generator gives each token a seed, from which vLLM's kernel makes noise for every logit; the
    largest sum is taken.  Here it is asked again with Transformers' logits, those of the token raised by 1e-4.
    """

    def wins(row: torch.Tensor, token: int, noise: torch.Tensor) -> bool:
        raised = row[None].clone()
        raised[0, token] += 1e-4
        return int(torch.ops._C.fused_gumbel_argmax(raised, noise)) == token

    seeds = list(range(3, 43))
    alone = {}
    for sample in reversed(range(len(samples))):
        for first in range(0, len(seeds), 7):
            [group] = engine.generate(ask([samples[sample]], seeds[first : first + 7], 24))
            alone.update({(sample, seeds[first + i]): g.tokens for i, g in enumerate(group)})
    together = engine.generate(ask(samples, seeds, 24))
    same, drawn = 0, 0
    for number, group in enumerate(together):
        for seed, generation in zip(seeds, group, strict=True):
            other = alone[number, seed]
            same += generation.tokens == other
            logprobs = references[0].logprobs(samples[number], generation.tokens, engine.banned, 1.0)
            generator = torch.Generator().manual_seed(seed)
            for token, theirs, row in zip(generation.tokens, [*other, *[-1] * 24], logprobs, strict=False):
                noise = torch.randint(0, 2**31, (1,), generator=generator)
                assert wins(row, token, noise), "the token is the one that the noise chose"
                drawn += 1
                if token != theirs:
                    assert wins(row, theirs, noise), "no near-tie"
                    break
    assert same >= 0.99 * len(samples) * len(seeds) and drawn > 2000


def test_yarn_is_that_of_transformers(started, make_reference, processor, samples, ask):
    original, yarn = make_reference(True, 5, 64), make_reference(True, 6, 64, yarn=8)
    own = Processor(yarn.folder, processor.config)
    engine = RolloutEngine(yarn.folder, RolloutConfig(max_num_seqs=16), own, "float32", MAX_MODEL_LEN)
    assert max(map(len, samples)) > 64, "the documents must be longer than the original positions"
    check_greedy_tokens(engine, yarn, samples, ask)
    engine.update(original.held())
    stretched = type(yarn)(yarn.folder)
    stretched.model.load_state_dict(original.model.state_dict())
    responses = engine.generate(ask(samples, [3, 4]))
    assert stretched.worst(samples, responses, engine.banned, 1.0) < CLOSE
    assert original.worst(samples, responses, engine.banned, 1.0) > 1e-2, "YaRN must matter here"


def test_rotary_table_is_filled_to_its_end(make_reference):
    shape = Processor(make_reference(True, 7, 32768, yarn=4).folder, DataConfig()).shape
    cache = torch.full((140000, shape.head_dim), torch.nan)
    fill_rotary_cache(cache, shape)
    frequencies, scaling = inverse_frequencies(shape)
    for position in (0, 1, 40000, 65535, 65536, 139999):
        angles = torch.tensor(float(position)) * frequencies
        assert torch.equal(cache[position], torch.cat((angles.cos(), angles.sin())) * scaling)
    assert cache.isfinite().all()


def test_a_response_depends_on_its_own_seed_alone(engine, samples, ask):
    together = engine.generate(ask(samples, [7, 8, 9]))
    apart = engine.generate(ask(samples[1:2], [9, 40, 7, 7]))[0]
    assert [g.tokens for g in (apart[2], apart[3], apart[0])] == [together[1][k].tokens for k in (0, 0, 2)]
    assert len({tuple(g.tokens) for g in [*together[1], apart[1]]}) == 4


def test_sampling_follows_the_reported_distribution(engine, references, samples, ask):
    draws = 4096
    generated = engine.generate(ask(samples[1:2], range(draws), 1, 1.5))[0]
    expected = draws * references[0].logprobs(samples[1], [0], engine.banned, 1.5)[0].exp()
    counts = torch.bincount(torch.tensor([g.tokens[0] for g in generated]), minlength=len(expected))
    common = expected > 5
    freedom = int(common.sum())
    chi2 = ((counts - expected)[common] ** 2 / expected[common]).sum().item()
    assert freedom > 100
    assert abs(chi2 - freedom) < 4 * (2 * freedom) ** 0.5


def test_responses_end_at_an_end_token_or_at_their_limit(engine, samples, ask):
    responses = [g for group in engine.generate(ask(samples, range(30), 24, 2.0)) for g in group]
    ends = {g.tokens[-1] for g in responses if g.stopped}
    assert len(ends) == 2
    for g in responses:
        assert len(g.tokens) == len(g.logprobs) and g.logprobs.dtype == np.float32
        assert g.stopped or len(g.tokens) == 24
        assert not ends & set(g.tokens[:-1])


def test_more_prompts_than_one_step_takes_are_answered(engine, references, long_samples, ask):
    responses = engine.generate(ask(long_samples, [1], 3))
    assert references[0].worst(long_samples[::10], responses[::10], engine.banned, 1.0) < CLOSE


def test_every_prompt_is_handed_over_as_it_finishes(engine, samples, ask):
    handed = {}
    returned = engine.generate(ask(samples, [1, 2, 5]), handed.__setitem__)
    assert [handed[number] for number in range(len(samples))] == returned
    assert all(len(group) == 3 for group in returned)
    assert engine.generate([]) == []


def test_layout_that_does_not_divide_is_refused(started, references, processor):
    with pytest.raises(RolloutError, match=r"rollout\.tp=2 does not divide the 1 processes"):
        RolloutEngine(references[0].folder, RolloutConfig(tp=2), processor, "float32", MAX_MODEL_LEN)


def test_what_is_given_up_leaves_nothing_behind(engine, references, samples, ask):
    prompts = ask(samples, [3, 4, 9])
    expected = engine.generate(prompts)
    given, steps, finished = list(enumerate(prompts)), [], []

    def between():
        steps.append(1)
        return len(steps) == 5

    def take(outstanding):
        taken, given[:] = given[:], []
        return taken

    failed = engine.answer(take, lambda number, found: finished.append(number), between)
    assert failed == [] and len(finished) < len(prompts) and len(steps) == 5
    engine.sleep()  # refuses where requests still hold the cache
    engine.update(references[0].held())
    found = engine.generate(prompts)
    assert [[g.tokens for g in group] for group in found] == [[g.tokens for g in group] for group in expected]


def test_one_time_out_bounds_the_groups_of_vllm_too(started):
    groups = [group for group in torch.distributed.distributed_c10d._world.pg_map]
    bounded = [group for group in groups if group is not distributed.patient_group()]
    limits = {group._get_backend(torch.device("cpu")).options._timeout for group in bounded}
    assert len(bounded) > 5 and limits == {distributed.time_limit(distributed.HANG_TIMEOUT_S)}


@pytest.mark.parametrize("variable", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_expandable_segments_go_without_vllms_own_all_reduce(processor, monkeypatch, variable):
    """What vLLM is asked for on a GPU; all of it are arguments that this vLLM has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plain = _settings(RolloutConfig(), processor, "bfloat16", 256)
    monkeypatch.setenv(variable, "max_split_size_mb:512,expandable_segments:True")
    expandable = _settings(RolloutConfig(), processor, "bfloat16", 256)
    assert (plain["disable_custom_all_reduce"], expandable["disable_custom_all_reduce"]) == (False, True)
    assert plain.keys() <= {field.name for field in dataclasses.fields(EngineArgs)}


@pytest.mark.parametrize(("offload", "own", "share"), [(False, 0.0, 0.5), (True, 0.0, 0.85), (True, 0.6, 0.6)])
def test_an_engine_whose_trainer_is_offloaded_takes_the_gpu_and_leaves_it(processor, monkeypatch, offload, own, share):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = RolloutConfig(gpu_memory_utilization=own)
    settings = _settings(config, processor, "bfloat16", 256, offload)
    assert (settings["gpu_memory_utilization"], settings["sleep_mode_offload_cudagraph"]) == (share, offload)
