"""Tiny models, prompts of every kind, and Transformers' word on what the engine should answer."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ovr_megatron.config import DataConfig, Sampling
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.row_parsing import parse_row
from ovr_megatron.data.samples import Sample
from ovr_megatron.data.schema import Row
from ovr_megatron.families import ModelShape, default_family, family_of, family_of_folder
from ovr_megatron.families.stretch import stretch_positions
from ovr_megatron.model.tiny import TinySizes, make_tiny_model
from ovr_megatron.rollout.sampling import Generation, Prompt
from ovr_megatron.weights.folder import WeightFolder
from ovr_megatron.weights.slices import LocalShard, row_ranges
from ovr_megatron.weights.table import cut_dim, from_hf, rows

STD = 0.1  # wide enough that the banned ids would take a good share of the probability


class Reference:
    """One model folder and Transformers' model of it."""

    def __init__(self, folder: Path):
        self.folder = folder
        model_class = family_of_folder(folder).load_hf_class()
        self.model = model_class.from_pretrained(folder, dtype=torch.float32)

    def held(self) -> list[LocalShard]:
        """All weights on one rank."""
        shape, folder = ModelShape.from_hf(self.folder), WeightFolder(self.folder)
        fused = ((row, from_hf(row, [folder.tensor(name) for name in row.hf], shape)) for row in rows(shape))
        return [LocalShard(parameter, cut_dim(row), row_ranges(row, 1, 0, shape)) for row, parameter in fused]

    @torch.no_grad()
    def logprobs(self, sample: Sample, response: list[int], banned: list[int], temperature: float) -> Tensor:
        """log_softmax(masked logits / temperature) [n, V] where each token of ``response`` is drawn."""
        ids = torch.tensor([[*sample.tokens.tolist(), *response]])
        config = self.model.config
        kinds = (ids == config.image_token_id).long() + 2 * (ids == config.video_token_id).long()
        sizes = sample.grid_thw.prod(axis=1)
        firsts = sample.placement[np.cumsum([0, *sizes // 4])[:-1]]
        patches = np.split(sample.patches, np.cumsum(sizes)[:-1])
        inputs: dict[str, Tensor] = {}
        for kind, pixels, grid in ((1, "pixel_values", "image"), (2, "pixel_values_videos", "video")):
            chosen = [i for i, first in enumerate(firsts) if kinds[0, first] == kind]
            if chosen:
                inputs[pixels] = torch.from_numpy(np.concatenate([patches[i] for i in chosen]))
                inputs[f"{grid}_grid_thw"] = torch.from_numpy(sample.grid_thw[chosen])
        if sample.videos:
            inputs["second_per_grid_ts"] = torch.tensor([2 / metadata["fps"] for _, metadata in sample.videos])
        mask = torch.ones_like(ids)
        logits = self.model(input_ids=ids, attention_mask=mask, mm_token_type_ids=kinds, **inputs).logits[0]
        logits[:, banned] = -torch.inf
        return (logits[len(sample.tokens) - 1 : -1] / temperature).log_softmax(-1)

    def worst(
        self, samples: list[Sample], responses: list[list[Generation]], banned: list[int], temperature: float
    ) -> float:
        """Largest difference to the log-probabilities that came with ``responses``."""
        differences = []
        for sample, generated in zip(samples, responses, strict=True):
            for g in generated:
                expected = self.logprobs(sample, g.tokens, banned, temperature)
                expected = expected.gather(1, torch.tensor(g.tokens)[:, None])[:, 0]
                differences.append((expected - torch.from_numpy(g.logprobs)).abs().max().item())
        return max(differences)


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest) -> str:
    """The family of the models: the default one where a test does not choose."""
    return getattr(request, "param", default_family().name)


@pytest.fixture(scope="module")
def make_reference(tmp_path_factory: pytest.TempPathFactory, family: str) -> Callable[..., Reference]:
    """A model folder with random weights, tied or not, of a seed, and with YaRN over so many positions or without."""
    root = tmp_path_factory.mktemp("models")

    def make(tied: bool, seed: int, positions: int = 4096, yarn: float | None = None) -> Reference:
        # Layers that take features are to be in the first part of an interleaved pipeline, too.
        layers = 4 if family_of(family).is_default else 8
        folder, sizes = root / f"{tied}{seed}", TinySizes(max_positions=positions, layers=layers)
        make_tiny_model(folder, tied=tied, seed=seed, sizes=sizes, std=STD, perturb=True, family=family)
        if yarn:
            stretch_positions(folder, yarn)
        return Reference(folder)

    return make


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory, family: str) -> Processor:
    """A processor whose image budget is not the folder's."""
    folder = make_tiny_model(tmp_path_factory.mktemp("processor"), family=family)
    # The rule after a video is that of the reference.
    return Processor(folder, DataConfig(min_pixels=56 * 56, max_pixels=200 * 200, after_video="grid"))


@pytest.fixture(scope="module")
def samples(processor: Processor, tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """A text, one image, three of different sizes (two over the budget), a video, a long video before an image."""
    root = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0)
    for i, size in enumerate([(84, 112), (56, 56), (300, 420), (230, 200), *[(56, 84)] * 12]):
        Image.fromarray(pixels.integers(0, 255, (*size, 3), dtype=np.uint8)).save(root / f"{i}.png")
    images = [{"type": "image", "image": f"{i}.png"} for i in range(4)]
    short, long = (
        {"type": "video", "video": [f"{4 + i}.png" for i in range(frames)], "fps": fps}
        for frames, fps in ((5, 2.0), (12, 0.5))
    )
    contents = [
        ["Add the red digits."],
        [images[0], "Which digits are red?"],
        [images[1], "and", images[2], images[3], "Which is larger?"],
        ["Look:", short, "What moves?"],
        [long, "What then?", images[0]],
    ]
    return processor.encode([row(content, root) for content in contents], generation=True)


def row(content: list, root: Path) -> Row:
    """A prompt row; plain strings become text parts."""
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return parse_row({"messages": [{"role": "user", "content": parts}], "answer": "1"}, "rows:1", root)


@pytest.fixture(scope="module")
def long_samples(processor: Processor) -> list[Sample]:
    """Texts that differ from their start on, together longer than what vLLM computes in one step."""
    rows = [row([f"{i} " + "Add the red digits. " * 40], Path()) for i in range(40)]
    found = processor.encode(rows, generation=True)
    assert max(map(len, found)) < 310 and sum(map(len, found)) > 8192
    return found


@pytest.fixture(scope="session")
def ask() -> Callable[..., list[Prompt]]:
    """Requests for samples, all with the same seeds."""
    return lambda samples, seeds, max_tokens=16, temperature=1.0: [
        Prompt(s.prompt_tokens, s.images, s.videos, seeds, Sampling(temperature, max_tokens)) for s in samples
    ]
