"""Memory given back and taken again: the bytes are gone, the bits are the same."""

from pathlib import Path

import pytest
import torch

from ovr_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from ovr_megatron.engine import Engine
from ovr_megatron.families import ModelShape
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.runtime import distributed
from ovr_megatron.runtime.offload import OffloadedTensors
from ovr_megatron.weights.folder import WeightFolder
from tests.plan.engines import PACKS, loss, storage_bytes, text_and_images


def test_views_see_what_was_there() -> None:
    whole = torch.arange(4096.0)
    view, small, lost = whole[1000:2000].view(10, 100), torch.ones(3), torch.ones(4096)
    kept, dropped = OffloadedTensors(), OffloadedTensors(keep=False)
    kept.offload([whole, view, small])
    dropped.offload([lost])
    assert whole.untyped_storage().nbytes() == lost.untyped_storage().nbytes() == 0
    assert not kept.is_empty and small.sum() == 3
    kept.offload([whole])  # has no memory to give
    kept.wait_onloaded()
    dropped.wait_onloaded()
    assert kept.is_empty and torch.equal(whole, torch.arange(4096.0)) and view[0, 0] == 1000
    assert not lost.any()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("offload"), tied=True, seed=2)


def held_bytes(engine: Engine) -> dict[str, int]:
    return {
        "weights": storage_bytes(engine._weight_tensors()),
        "gradients": storage_bytes(engine._gradient_tensors()),
        "optimizer": storage_bytes(engine.live.state_tensors()),
    }


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_that_rests_learns_the_same(folder: Path, sharded: bool, dtype: str) -> None:
    parallel = ParallelConfig(distributed_optimizer=sharded, overlap=sharded)
    world = distributed.start(parallel, seed=1)
    shape = ModelShape.from_hf(folder)
    packs = [text_and_images(shape, *PACKS[name]) for name in ("documents", "images")]

    def engine() -> Engine:
        built = Engine(shape, ModelConfig(path=str(folder), dtype=dtype), parallel, world)
        return built.with_optimizer(OptimizerConfig(lr=1e-3, warmup_steps=0), 4).load(WeightFolder(folder))

    resting, other = engine(), engine()
    for _ in range(2):
        resting.train(packs, loss)
        other.train(packs, loss)
        before = held_bytes(resting)
        resting.offload()
        left = held_bytes(resting)
        assert all(left[kind] < 0.02 * before[kind] for kind in before), "counters and the smallest tensors stay"
    for (name, ours), (_, theirs) in zip(resting.weights(), other.weights(), strict=True):
        assert torch.equal(ours, theirs), name
    for which in resting.state_kinds:
        for (name, ours), (_, theirs) in zip(resting.optimizer_state(which), other.optimizer_state(which), strict=True):
            assert torch.equal(ours, theirs), name
    for one in (resting, other):
        one.load(WeightFolder(folder)).load_optimizer_state({}, 2)
    assert held_bytes(resting) == left, "what was asked for has gone back to where it was"
    for one in (resting, other):
        one.train(packs, loss)
    for (name, ours), (_, theirs) in zip(resting.weights(), other.weights(), strict=True):
        assert torch.equal(ours, theirs), name
    for module in resting.parts[0].modules():  # as Transformer Engine's keep copies of their weights
        module._fp8_workspaces = {"weight": torch.ones(8)}
    resting.offload("gradients", "optimizer")
    assert all(module._fp8_workspaces for module in resting.parts[0].modules())
    resting.offload()
    assert not any(module._fp8_workspaces for module in resting.parts[0].modules())
    resting.held()
    resting.offload("gradients", "optimizer")
    assert held_bytes(resting)["weights"] == before["weights"]
