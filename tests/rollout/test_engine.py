"""The rollout engine against Transformers: same tokens in, same distribution out, before and after an update."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from ovr_megatron.config import DataConfig, ParallelConfig, RolloutConfig
from ovr_megatron.data.processing import Processor, Sample
from ovr_megatron.data.schema import parse_row
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.rollout.sampling import Generation, Prompt, RolloutError
from ovr_megatron.rollout.transfer import TransferError
from ovr_megatron.runtime import distributed

STD = 0.1  # wide enough that banned ids would take a good share of the probability
MAX_MODEL_LEN = 256


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of one shape with different weights."""
    root = tmp_path_factory.mktemp("models")
    return [make_tiny_model(root / str(seed), tied=True, seed=seed, std=STD, perturb=True) for seed in (1, 2)]


@pytest.fixture(scope="module")
def processor(folders: list[Path]) -> Processor:
    """A processor whose image budget is not the folder's."""
    return Processor(folders[0], DataConfig(min_pixels=56 * 56, max_pixels=200 * 200))


@pytest.fixture(scope="module")
def samples(processor: Processor, tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """A text, one image, three of different sizes (two over the budget), a video, a long video before an image."""
    root = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0)
    sizes = [(84, 112), (56, 56), (300, 420), (230, 200), *[(56, 84)] * 12]
    for i, size in enumerate(sizes):
        Image.fromarray(pixels.integers(0, 255, (*size, 3), dtype=np.uint8)).save(root / f"{i}.png")

    def image(i: int) -> dict:
        return {"type": "image", "image": f"{i}.png"}

    def video(frames: int, fps: float) -> dict:
        return {"type": "video", "video": [f"{4 + i}.png" for i in range(frames)], "fps": fps}

    def text(words: str) -> dict:
        return {"type": "text", "text": words}

    contents = [
        [text("Add the red digits.")],
        [image(0), text("Which digits are red?")],
        [image(1), text("and"), image(2), image(3), text("Which is larger?")],
        [text("Look:"), video(5, 2.0), text("What moves?")],
        [video(12, 0.5), text("What then?"), image(0)],
    ]
    rows = [
        parse_row({"messages": [{"role": "user", "content": content}], "answer": "1"}, f"rows:{i}", root)
        for i, content in enumerate(contents)
    ]
    return processor.encode(rows, generation=True)


def surroundings() -> dict[str, object]:
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


@pytest.fixture(scope="module")
def started(folders: list[Path], processor: Processor) -> Iterator[SimpleNamespace]:
    """One engine for the module, and what its start changed around it."""
    os.environ["OVR_TEST_MARK"] = "1"
    distributed.start(ParallelConfig(), seed=5)
    before = surroundings()
    engine = RolloutEngine(folders[0], RolloutConfig(max_num_seqs=64), processor, "float32", MAX_MODEL_LEN)
    changed = [name for name, value in surroundings().items() if value != before[name]]
    yield SimpleNamespace(engine=engine, changed=changed)
    del os.environ["OVR_TEST_MARK"]


@pytest.fixture
def engine(started: SimpleNamespace, folders: list[Path]) -> RolloutEngine:
    """The engine with the first folder's weights."""
    started.engine.update(hub_weights(folders[0]))
    return started.engine


@pytest.fixture(scope="module")
def references(folders: list[Path]) -> list[Qwen2_5_VLForConditionalGeneration]:
    """Transformers' model of each folder."""
    return [Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32) for folder in folders]


def hub_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights of a folder under the hub's names."""
    yield from load_file(folder / "model.safetensors").items()


def prompts(samples: list[Sample], seeds: list[int], max_tokens: int = 16) -> list[Prompt]:
    """One request for each sample."""
    return [Prompt(s.prompt_tokens, s.images, s.videos, seeds, max_tokens) for s in samples]


@torch.no_grad()
def oracle(
    model: Qwen2_5_VLForConditionalGeneration, sample: Sample, response: list[int], banned: list[int], temperature: float
) -> Tensor:
    """log_softmax(masked logits / temperature) [n, V] at the positions of ``response``, by Transformers."""
    ids = torch.tensor([[*sample.tokens.tolist(), *response]])
    kinds = (ids == model.config.image_token_id).long() + 2 * (ids == model.config.video_token_id).long()
    inputs: dict[str, Tensor] = {}
    where = torch.from_numpy(sample.placement)
    is_video = (ids[0, where] == model.config.video_token_id).repeat_interleave(4)
    grids = torch.from_numpy(sample.grid_thw)
    moving = [ids[0, sample.placement[i]].item() == model.config.video_token_id for i in starts(sample)]
    patches = torch.from_numpy(sample.patches)
    if not all(moving):
        inputs |= {"pixel_values": patches[~is_video], "image_grid_thw": grids[[not m for m in moving]]}
    if any(moving):
        seconds = [2 / metadata["fps"] for _, metadata in sample.videos]
        inputs |= {"pixel_values_videos": patches[is_video], "video_grid_thw": grids[moving]}
        inputs |= {"second_per_grid_ts": torch.tensor(seconds)}
    mask = torch.ones_like(ids)
    logits = model(input_ids=ids, attention_mask=mask, mm_token_type_ids=kinds, **inputs).logits[0].float()
    logits[:, banned] = -torch.inf
    return (logits[len(sample.tokens) - 1 : -1] / temperature).log_softmax(-1)


def starts(sample: Sample) -> list[int]:
    """Index in ``placement`` of the first feature of each image or video."""
    features = sample.grid_thw.prod(axis=1) // 4
    return [0, *np.cumsum(features)[:-1].tolist()] if len(features) else []


def worst(
    model: Qwen2_5_VLForConditionalGeneration,
    samples: list[Sample],
    responses: list[list[Generation]],
    banned: list[int],
    temperature: float,
) -> float:
    """Largest difference of log-probabilities over all responses."""
    differences = []
    for sample, generated in zip(samples, responses, strict=True):
        for g in generated:
            expected = oracle(model, sample, g.tokens, banned, temperature)
            at = expected.gather(1, torch.tensor(g.tokens)[:, None])[:, 0]
            differences.append((at - torch.from_numpy(g.logprobs)).abs().max().item())
    return max(differences)


def test_start_leaves_the_process_as_it_was(started: SimpleNamespace) -> None:
    assert started.changed == []


def test_generation_and_update_leave_the_process_as_it_was(
    engine: RolloutEngine, folders: list[Path], samples: list[Sample]
) -> None:
    before = surroundings()
    engine.generate(prompts(samples, [1]), 1.0)
    engine.update(hub_weights(folders[0]))
    assert [name for name, value in surroundings().items() if value != before[name]] == []


def test_engine_expands_prompts_like_the_trainer(engine: RolloutEngine, samples: list[Sample]) -> None:
    for sample, (generation,) in zip(samples, engine.generate(prompts(samples, [1], 1), 1.0), strict=True):
        assert generation.prompt_tokens == sample.tokens.tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_transformers_over_the_allowed_ids(
    engine: RolloutEngine, samples: list[Sample], references: list, temperature: float
) -> None:
    responses = engine.generate(prompts(samples, [3, 4, 9]), temperature)
    assert worst(references[0], samples, responses, engine.banned, temperature) < 1e-5
    assert worst(references[0], samples, responses, [], temperature) > 1e-2, "the ban must matter here"
    assert not {t for group in responses for g in group for t in g.tokens} & set(engine.banned)


def test_update_reaches_text_vision_and_head_and_drops_every_cache(
    engine: RolloutEngine, folders: list[Path], samples: list[Sample], references: list
) -> None:
    engine.generate(prompts(samples, [3, 4]), 1.0)  # fills prefix and encoder caches with the old weights' results
    engine.update(hub_weights(folders[1]))
    responses = engine.generate(prompts(samples, [3, 4]), 1.0)
    assert worst(references[1], samples, responses, engine.banned, 1.0) < 1e-5
    assert worst(references[0], samples, responses, engine.banned, 1.0) > 0.1


def test_engine_keeps_a_copy_of_the_weights(engine: RolloutEngine, folders: list[Path], samples: list[Sample]) -> None:
    weights = dict(hub_weights(folders[1]))
    engine.update(weights.items())
    before = engine.generate(prompts(samples, [0]), 0.0)
    for tensor in weights.values():
        tensor.zero_()
    after = engine.generate(prompts(samples, [0]), 0.0)
    assert [g.tokens for (g,) in after] == [g.tokens for (g,) in before]


def test_incomplete_update_is_refused_and_a_full_one_repairs_it(
    engine: RolloutEngine, folders: list[Path], samples: list[Sample], references: list
) -> None:
    weights = dict(hub_weights(folders[1]))
    del weights["model.layers.2.mlp.down_proj.weight"]
    with pytest.raises(TransferError, match=r"leaves 1 of .*layers\.2\.mlp\.down_proj"):
        engine.update(weights.items())
    engine.update(hub_weights(folders[1]))
    responses = engine.generate(prompts(samples, [3]), 1.0)
    assert worst(references[1], samples, responses, engine.banned, 1.0) < 1e-5


def test_greedy_tokens_are_those_of_transformers_up_to_a_near_tie(
    engine: RolloutEngine, samples: list[Sample], references: list
) -> None:
    compared = 0
    for sample, (generation,) in zip(samples, engine.generate(prompts(samples, [0], 32), 0.0), strict=True):
        expected = oracle(references[0], sample, generation.tokens, engine.banned, 1.0)
        gaps = expected.topk(2).values @ torch.tensor([1.0, -1.0])
        clear = int(torch.cumprod((gaps > 1e-4).long(), 0).sum())
        assert generation.tokens[:clear] == expected.argmax(-1)[:clear].tolist()
        compared += clear
    assert compared > 100


def test_a_response_depends_on_its_own_seed_alone(engine: RolloutEngine, samples: list[Sample]) -> None:
    together = engine.generate(prompts(samples, [7, 8, 9]), 1.0)
    apart = engine.generate(prompts(samples[1:2], [9, 40, 7, 7]), 1.0)[0]
    assert [g.tokens for g in (apart[2], apart[3], apart[0])] == [together[1][k].tokens for k in (0, 0, 2)]
    assert len({tuple(g.tokens) for g in [*together[1], apart[1]]}) == 4


def test_sampling_follows_the_reported_distribution(
    engine: RolloutEngine, samples: list[Sample], references: list
) -> None:
    draws = 4096
    generated = engine.generate(prompts(samples[1:2], list(range(draws)), 1), 1.5)[0]
    counts = torch.zeros(engine_vocabulary := references[0].config.text_config.vocab_size)
    counts.index_add_(0, torch.tensor([g.tokens[0] for g in generated]), torch.ones(draws))
    expected = draws * oracle(references[0], samples[1], [0], engine.banned, 1.5)[0].exp()
    common = expected > 5
    chi2 = ((counts - expected)[common] ** 2 / expected[common]).sum().item()
    freedom = int(common.sum())
    assert freedom > 20 and engine_vocabulary > freedom
    assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5


def test_responses_end_at_an_end_token_or_at_their_limit(engine: RolloutEngine, samples: list[Sample]) -> None:
    responses = [g for group in engine.generate(prompts(samples, list(range(30)), 24), 2.0) for g in group]
    ends = {g.tokens[-1] for g in responses if g.stopped}
    assert len(ends) == 2
    for g in responses:
        assert len(g.tokens) == len(g.logprobs) and g.logprobs.dtype == np.float32
        assert g.stopped or len(g.tokens) == 24
        assert not ends & set(g.tokens[:-1])


def test_prompts_beyond_one_batch_are_answered(engine: RolloutEngine, samples: list[Sample], references: list) -> None:
    many = prompts(samples[2:3] * 90, [1], 2)  # 90 x 128 tokens, with images that no cache may join
    assert 90 * len(samples[2]) > 8192
    responses = engine.generate(many, 1.0)
    assert worst(references[0], samples[2:3], responses[-1:], engine.banned, 1.0) < 1e-5


def test_progress_counts_responses(engine: RolloutEngine, samples: list[Sample]) -> None:
    counted: list[int] = []
    engine.generate(prompts(samples, [1, 2, 5]), 1.0, counted.append)
    assert sum(counted) == 3 * len(samples)
    assert engine.generate([], 1.0) == []


def test_layout_that_does_not_divide_is_refused(started: SimpleNamespace, folders: list[Path], processor: Processor) -> None:
    with pytest.raises(RolloutError, match=r"rollout\.tp=2 does not divide the 1 processes"):
        RolloutEngine(folders[0], RolloutConfig(tp=2), processor, "float32", MAX_MODEL_LEN)
