"""The tokens of the quickstart's three stages, which no change of the data's code may move."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from ovr_megatron.config import ColdStartConfig, RLConfig, build, defaults
from ovr_megatron.data.pack_stream import PackStream
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.stream import open_stream
from ovr_megatron.launch import RECIPES
from ovr_megatron.model.tiny import TinySizes, make_tiny_model
from ovr_megatron.ppo.prompts import PromptStream

SIZES = TinySizes(layers=1, hidden=64, heads=2, kv_heads=1, ffn=64, vision_hidden=32, vision_ffn=32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), sizes=SIZES)


def recipe(schema: type, name: str) -> object:
    values = OmegaConf.load(RECIPES / f"{name}.yaml")
    values.pop("defaults")
    given = OmegaConf.from_dotlist(["run.dir=run", "model.path=model"])
    return build(schema, OmegaConf.merge(defaults(schema), values, given))


def digest(arrays: list[np.ndarray]) -> str:
    return hashlib.sha256(b"".join(array.astype(np.int64).tobytes() for array in arrays)).hexdigest()[:16]


@pytest.mark.parametrize(
    ("name", "expected"), [("tiny_base", "c9311c11a291d2a5"), ("tiny_cold_start", "b219cd224ceb4428")]
)
def test_supervised_packs(model: Path, name: str, expected: str) -> None:
    config = recipe(ColdStartConfig, name)
    processor = Processor(model, config.data)
    rows = open_stream(config.data, config.run.seed)
    packs = PackStream(rows, processor, config.data.pack_tokens, config.packs_per_step)
    fields = ("tokens", "labels", "position_ids", "cu_seqlens", "grid_thw", "placement")
    arrays = [getattr(pack, field).numpy() for _ in range(4) for pack in next(packs) for field in fields]
    assert digest(arrays) == expected


def test_prompts(model: Path) -> None:
    config = recipe(RLConfig, "tiny_rl")
    processor = Processor(model, config.data)
    prompts = PromptStream(open_stream(config.data, config.run.seed), processor, config.reward.rules)
    samples = processor.encode(prompts.draw(128), generation=True)
    arrays = [np.asarray(getattr(s, name)) for s in samples for name in ("tokens", "position_ids", "prompt_tokens")]
    assert digest(arrays) == "af4b0d3608b58065"
