"""Tests that need a Hopper GPU: ``pytest -s tests/gpu``; elsewhere they are skipped.

Those of rollouts and stages run on a CPU, too, with ANYWHERE=1.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ovr_megatron.config import ParallelConfig
from ovr_megatron.model.tiny import TinySizes, make_tiny_model
from ovr_megatron.runtime import distributed
from ovr_megatron.runtime.distributed import World

SIZES = TinySizes(hidden=256, heads=4, kv_heads=2, ffn=512, vision_hidden=128, vision_heads=4, vision_ffn=256)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    anywhere = ("test_rollout.py", "rollout.py", "test_stages.py") if os.environ.get("ANYWHERE") else ()
    for item in items:
        if "tests/gpu/" in str(item.path) and item.path.name not in anywhere:
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    yield distributed.start(ParallelConfig(), seed=1)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tied and an untied small model whose sizes FP8 matrix products accept."""
    root = tmp_path_factory.mktemp("models")
    return {
        name: make_tiny_model(root / name, tied=name == "tied", seed=5, perturb=True, sizes=SIZES)
        for name in ("tied", "untied")
    }
