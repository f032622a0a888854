"""The vision tower on two ranks: cut over them (tensor parallel), or the images dealt out to them (context parallel).

``torchrun --nproc-per-node 2 -m ovr_megatron.analysis.bench_vision`` prints one JSON row for each layout.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ovr_megatron.config import ModelConfig, ParallelConfig
from ovr_megatron.data.packing import IGNORED, Pack
from ovr_megatron.engine import Engine
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


def rows(rounds: int) -> list[dict[str, Any]]:
    """Start the two processes and collect their rows."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, "-m", __name__, str(rounds)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def show(found: Sequence[dict[str, Any]]) -> str:
    """The rows as a table of text; ``ratio`` is one rank's seconds over the layout's."""
    lines = [f"{'':20}{'seconds':>9}{'patches/s':>11}{'ratio':>7}{'parameters a rank':>20}"]
    for row in found:
        line = f"{row['name']:20}{row['seconds']:9.3f}{row['patches'] / row['seconds']:11,.0f}"
        lines.append(line + f"{found[0]['seconds'] / row['seconds']:7.2f}{row['parameters']:20,}")
    return "\n".join(lines)


def measure(world: World, folder: Path, parallel: ParallelConfig, rounds: int) -> tuple[float, int]:
    """Best seconds of the tower's forward and backward over a pack of images, and its parameters on this rank."""
    model = Engine(ModelShape.from_hf(folder), ModelConfig(path=str(folder)), parallel, world)
    part = model.load(WeightFolder(folder)).parts[0]
    pack = image_pack(model.shape.vision.merge, model.shape.vision.patch_dim).to(world.device)
    best = float("inf")
    for _ in range(rounds + 1):
        dist.barrier()
        began = time.perf_counter()
        part._features(pack).sum().backward()
        dist.barrier()
        best = min(best, time.perf_counter() - began)
    return best, sum(parameter.numel() for parameter in part.vision.parameters())


def image_pack(merge: int, patch_dim: int) -> Pack:
    """Images of random pixels, one after the other."""
    grid = torch.tensor([(1, height, width) for height, width in SIDES])
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
    """Measure every layout and print one JSON row each."""
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
