"""The plan's activations beside what the allocator of a GPU reports at its peak."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ovr_megatron.coldstart.step_trainer import cross_entropy
from ovr_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from ovr_megatron.data.packing import Pack
from ovr_megatron.engine import Engine
from ovr_megatron.families import ModelShape
from ovr_megatron.plan.activations import PackShape, activations
from ovr_megatron.plan.layer import Kernels
from ovr_megatron.plan.parameters import model_state
from ovr_megatron.runtime.distributed import World

# Layers of the 7B model, fewer of them: activations of gigabytes, so that workspaces do not count.
SIZES = {"hidden": 3584, "heads": 28, "kv_heads": 4, "head_dim": 128, "ffn": 18944, "layers": 4, "vocab": 32000}
LENGTHS = (8192, 4096, 3000, 1096)


def text(shape: ModelShape, lengths: tuple[int, ...]) -> Pack:
    tokens = torch.randint(0, 256, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    return Pack(
        tokens=tokens,
        labels=tokens.clone(),
        position_ids=torch.cat([torch.arange(n) for n in lengths]).repeat(3, 1),
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        patches=torch.zeros(0, shape.vision.patch_dim),
        grid_thw=torch.zeros(0, 3, dtype=torch.int64),
        placement=torch.zeros(0, dtype=torch.int64),
    )


@pytest.mark.parametrize("layers", ["local", "transformer_engine"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_activations_at_their_peak(folders: dict[str, Path], world: World, layers: str, recompute: str) -> None:
    shape = replace(ModelShape.from_hf(folders["untied"]), mrope_section=(16, 24, 24), **SIZES)  # type: ignore[arg-type]
    model = ModelConfig(
        path="x", dtype="bfloat16", layers=layers, recompute=recompute, freeze_vision=True, freeze_merger=True
    )
    engine = Engine(shape, model, ParallelConfig(), world).with_optimizer(OptimizerConfig(), 1)
    pack = text(shape, LENGTHS)
    engine.backward([pack], cross_entropy)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    engine.backward([pack], cross_entropy)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    planned = activations(
        shape, model, ParallelConfig(), PackShape(sum(LENGTHS), sum(LENGTHS)), kernels=Kernels(layers, "cuda")
    )
    print(f"{layers} {recompute}: {peak / 2**30:.2f} GiB, plan {planned.peak / peak - 1:+.1%}")
    assert planned.peak == pytest.approx(peak, rel=0.1)


def test_state_is_what_the_allocator_holds(folders: dict[str, Path], world: World) -> None:
    shape = replace(ModelShape.from_hf(folders["untied"]), mrope_section=(16, 24, 24), **SIZES)  # type: ignore[arg-type]
    model = ModelConfig(path="x", dtype="bfloat16")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    engine = Engine(shape, model, ParallelConfig(), world).with_optimizer(OptimizerConfig(), 1)
    engine.train([text(shape, (64,))], cross_entropy)
    torch.cuda.synchronize()
    planned = model_state(shape, model, ParallelConfig(), 1).total
    assert torch.cuda.memory_allocated() - before == pytest.approx(planned, rel=0.01)
