"""The vision tower: patches a second beside Transformers' on one device, and on two ranks in two layouts.

On two ranks it is cut over them (tensor parallel), or the images are dealt out to them (context parallel).
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from ovr_megatron.analysis.apart import MeasurementError, rows_of
from ovr_megatron.analysis.published import fill, randomise, shape_of, write_model
from ovr_megatron.config import ModelConfig, ParallelConfig
from ovr_megatron.data.packing import IGNORED, Pack
from ovr_megatron.engine import Engine
from ovr_megatron.model.qwen25vl import DTYPES
from ovr_megatron.model.shape import ModelShape
from ovr_megatron.model.tiny import TinySizes, make_tiny_model
from ovr_megatron.runtime import distributed
from ovr_megatron.runtime.distributed import World
from ovr_megatron.weights.folder import WeightFolder

SIZES = TinySizes(vision_hidden=640, vision_heads=8, vision_ffn=1712, vision_depth=4, window=112)
SIDES = ((32, 32), (16, 24), (24, 24), (8, 16), (40, 24), (12, 12), (20, 28), (32, 16))  # in patches
LAYOUTS = {
    "one rank": ParallelConfig(),
    "tower cut over 2": ParallelConfig(tp=2),
    "images dealt to 2": ParallelConfig(cp=2),
}
REPEATS = 16  # of the images on a GPU: 68,608 patches


def rows(rounds: int) -> list[dict[str, Any]]:
    """Ours and Transformers' by turns, each time in a process of its own, then the two ranks where there is no GPU."""
    found = [_beside(who, rounds) for who in ("ours", "Transformers")]
    if "failed" not in found[0] | found[1]:
        found[0]["ratio"] = found[1]["seconds"] / found[0]["seconds"]
    if torch.cuda.is_available():
        return found
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    layouts = rows_of(__name__, rounds, launcher=launcher)
    for row in layouts[1:]:
        row["ratio"] = layouts[0]["seconds"] / row["seconds"]
    return found + layouts


def show(found: Sequence[dict[str, Any]]) -> str:
    """The rows as a table of text; ``ratio``: the seconds of Transformers, or of one rank, over this row's."""
    lines = [f"{'':20}{'seconds':>9}{'patches/s':>11}{'ratio':>7}{'parameters a rank':>20}"]
    for row in found:
        if "failed" in row:
            lines.append(f"{row['name']:20} failed: {row['failed']}")
            continue
        line = f"{row['name']:20}{row['seconds']:9.3f}{row['patches'] / row['seconds']:11,.0f}"
        lines.append(line + (f"{row['ratio']:7.2f}" if "ratio" in row else " " * 7) + f"{row['parameters']:20,}")
    return "\n".join(lines)


def _beside(who: str, rounds: int) -> dict[str, Any]:
    best: dict[str, Any] = {}
    for _ in range(rounds):
        try:
            (row,) = rows_of(__name__, who)
        except MeasurementError as error:
            return {"name": who, "failed": str(error)}
        best = row if row["seconds"] < best.get("seconds", float("inf")) else best
    return best


def measure_alone(who: str) -> dict[str, Any]:
    """Forward and backward of the 7B model's tower on a GPU, in bfloat16, elsewhere of a small one in float32."""
    on_gpu = torch.cuda.is_available()
    name, dtype, sides = ("7B", "bfloat16", SIDES * REPEATS) if on_gpu else ("tiny", "float32", SIDES)
    world = distributed.start(ParallelConfig(), seed=1, threads=0 if on_gpu else 1)
    pack = image_pack(2, 1176, sides)
    work: Callable[[], torch.Tensor]
    if who == "ours":
        engine = fill(Engine(shape_of(name, layers=1), ModelConfig(path=name, dtype=dtype), ParallelConfig(), world))
        part = engine.parts[0]
        model: torch.nn.Module = part.vision

        def work() -> torch.Tensor:
            return part._features(pack)
    else:
        with tempfile.TemporaryDirectory() as folder:
            config = AutoConfig.from_pretrained(write_model(name, Path(folder))).vision_config
        attention = "flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa"
        with torch.device(world.device):
            model = Qwen2_5_VisionTransformerPretrainedModel._from_config(
                config, dtype=DTYPES[dtype], attn_implementation=attention
            ).train()
        randomise(model.parameters())

        def work() -> torch.Tensor:
            return model(pack.patches.to(world.device, DTYPES[dtype]), grid_thw=pack.grid_thw.to(world.device))[1]

    seconds: list[float] = []
    while len(seconds) < 4 or sum(seconds[1:]) < 3.0:
        began = time.perf_counter()
        work().float().sum().backward()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        model.zero_grad()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"name": who, "seconds": min(seconds[1:]), "patches": len(pack.patches), "parameters": parameters}


def measure(world: World, folder: Path, parallel: ParallelConfig, rounds: int) -> tuple[float, int]:
    """Best seconds of the tower's forward and backward over a pack of images, and its parameters on this rank."""
    model = Engine(ModelShape.from_hf(folder), ModelConfig(path=str(folder)), parallel, world)
    part = model.load(WeightFolder(folder)).parts[0]
    pack = image_pack(model.shape.vision.merge, model.shape.vision.patch_dim, SIDES)
    best = float("inf")
    for _ in range(rounds + 1):
        dist.barrier()
        began = time.perf_counter()
        part._features(pack).sum().backward()
        dist.barrier()
        best = min(best, time.perf_counter() - began)
    return best, sum(parameter.numel() for parameter in part.vision.parameters())


def image_pack(merge: int, patch_dim: int, sides: Sequence[tuple[int, int]]) -> Pack:
    """Images of random pixels, one after the other."""
    grid = torch.tensor([(1, height, width) for height, width in sides])
    patches = int(grid.prod(-1).sum())
    features = patches // merge**2
    return Pack(
        tokens=torch.zeros(features, dtype=torch.int64),
        labels=torch.full((features,), IGNORED),
        position_ids=torch.zeros(3, features, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, features], dtype=torch.int32),
        patches=torch.randn(patches, patch_dim, generator=torch.Generator().manual_seed(0)),
        grid_thw=grid,
        placement=torch.arange(features),
    )


def main() -> None:
    """One measurement alone, or every layout on two ranks; JSON rows on standard output."""
    if sys.argv[1] in ("ours", "Transformers"):
        print(json.dumps(measure_alone(sys.argv[1])), flush=True)
        return
    world = distributed.start(ParallelConfig(), seed=1, threads=1)
    box = [tempfile.mkdtemp() if world.is_main else ""]
    dist.broadcast_object_list(box)
    folder = Path(box[0])
    if world.is_main:
        make_tiny_model(folder, tied=True, seed=1, sizes=SIZES)
    dist.barrier()
    patches = sum(height * width for height, width in SIDES)
    for name, parallel in LAYOUTS.items():
        seconds, parameters = measure(world, folder, parallel, int(sys.argv[1]))
        if world.is_main:
            row = {"name": name, "seconds": seconds, "patches": patches, "parameters": parameters}
            print(json.dumps(row), flush=True)
    distributed.finish()


if __name__ == "__main__":
    main()
