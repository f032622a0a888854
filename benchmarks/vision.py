"""Measure the vision tower: patches a second beside Transformers' on one device, and on two ranks in two layouts.

On two ranks the tower is cut over them (tensor parallel), or the images are balanced over them (context parallel).
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModel

from benchmarks.random_models import randomise, randomise_engine, read_shape, write_model
from benchmarks.subprocess_bench import BenchRow, MeasurementError, run_in_subprocess
from ovr_megatron.config import ModelConfig, ParallelConfig
from ovr_megatron.data.packing import IGNORED, Pack
from ovr_megatron.engine import Engine
from ovr_megatron.families import ModelShape
from ovr_megatron.families.tiny import TinySizes
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.model.transformer_config import DTYPES
from ovr_megatron.runtime import distributed
from ovr_megatron.runtime.distributed import World
from ovr_megatron.weights.folder import WeightFolder

Tower = tuple[torch.nn.Module, Callable[[], torch.Tensor]]
"""The tower's module, and a function that returns the sum of the features of a pack of images."""

SIZES = TinySizes(vision_hidden=640, vision_heads=8, vision_ffn=1712, vision_depth=4, window=112)
# Height and width of images, in patches.
SIDES = ((32, 32), (16, 24), (24, 24), (8, 16), (40, 24), (12, 12), (20, 28), (32, 16))
LAYOUTS = {
    "one rank": ParallelConfig(),
    "tower cut over 2": ParallelConfig(tp=2),
    "images dealt to 2": ParallelConfig(cp=2),
}
LAYERS = 3  # of the language model, which does not run; a tower may have features for as many
REPEATS = 16  # of the images on a GPU: 68,608 patches
MIN_SECONDS = 3.0  # of measured rounds on one device


def run(rounds: int, shape: str, family: str = "") -> list[BenchRow]:
    """Measure our tower and Transformers', and without a GPU the layouts on two ranks; each in a new process.

    Args:
        rounds: processes of each tower; the fastest counts.
        shape: ``tiny`` or a preset, whose tower is measured.
        family: of a tiny model; empty: the default one.
    """
    ours = _best_of("ours", rounds, shape, family)
    rival = _best_of("Transformers", rounds, shape, family)
    if "failed" not in ours | rival:
        ours["ratio"] = rival["seconds"] / ours["seconds"]
    if torch.cuda.is_available():
        return [ours, rival]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    one_rank, *two_ranks = run_in_subprocess(__name__, "layouts", rounds, family, launcher=launcher)
    for row in two_ranks:
        row["ratio"] = one_rank["seconds"] / row["seconds"]
    return [ours, rival, one_rank, *two_ranks]


def format_table(rows: Sequence[BenchRow]) -> str:
    """Return the rows as a table of text; ``ratio``: the seconds of Transformers, or of one rank, over this row's."""
    lines = [f"{'':20}{'seconds':>9}{'patches/s':>11}{'ratio':>7}{'parameters a rank':>20}"]
    for row in rows:
        if "failed" in row:
            lines.append(f"{row['name']:20} failed: {row['failed']}")
            continue
        line = f"{row['name']:20}{row['seconds']:9.3f}{row['patches'] / row['seconds']:11,.0f}"
        line += f"{row['ratio']:7.2f}" if "ratio" in row else " " * 7
        lines.append(line + f"{row['parameters']:20,}")
    return "\n".join(lines)


def _best_of(implementation: str, rounds: int, shape: str, family: str) -> BenchRow:
    """Return the row of the fastest of ``rounds`` processes, or one that says why a process failed."""
    best: BenchRow = {}
    for _ in range(rounds):
        try:
            (row,) = run_in_subprocess(__name__, implementation, shape, family)
        except MeasurementError as error:
            return {"name": implementation, "failed": str(error)}
        if row["seconds"] < best.get("seconds", float("inf")):
            best = row
    return best


def measure_alone(implementation: str, shape: str, family: str) -> BenchRow:
    """Measure forward and backward of the tower of ``shape``: in bfloat16 on a GPU, else in float32."""
    on_gpu = torch.cuda.is_available()
    dtype = "bfloat16" if on_gpu else "float32"
    sides = SIDES * REPEATS if on_gpu else SIDES
    world = distributed.start(ParallelConfig(), seed=1, threads=0 if on_gpu else 1)
    vision = read_shape(shape, LAYERS, family).vision
    pack = make_image_pack(vision.merge, vision.patch_dim, sides)
    build = _build_ours if implementation == "ours" else _build_transformers
    model, forward = build(world, pack, shape, family, dtype)
    seconds: list[float] = []
    while len(seconds) < 4 or sum(seconds[1:]) < MIN_SECONDS:  # the first round warms up
        start = time.perf_counter()
        forward().backward()
        if on_gpu:
            # Kernels run after the call has returned: the time ends when the device is done.
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        model.zero_grad()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"name": implementation, "seconds": min(seconds[1:]), "patches": len(pack.patches), "parameters": parameters}


def _build_ours(world: World, pack: Pack, shape: str, family: str, dtype: str) -> Tower:
    model = ModelConfig(path=shape, dtype=dtype)  # type: ignore[arg-type]
    engine = Engine(read_shape(shape, LAYERS, family), model, ParallelConfig(), world)
    randomise_engine(engine)
    # The function refers to the engine, which so lives as long as its part is used.
    return engine.parts[0].vision, lambda: engine.parts[0]._features(pack).float().sum()


def _build_transformers(world: World, pack: Pack, shape: str, family: str, dtype: str) -> Tower:
    with tempfile.TemporaryDirectory() as folder:
        config = AutoConfig.from_pretrained(write_model(shape, Path(folder), family=family)).vision_config
    attention = "flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa"
    with torch.device(world.device):
        model = AutoModel.from_config(config, dtype=DTYPES[dtype], attn_implementation=attention).train()
    randomise(model.parameters())

    def forward() -> torch.Tensor:
        patches = pack.patches.to(world.device, DTYPES[dtype])
        output = model(patches, grid_thw=pack.grid_thw.to(world.device))
        # Some towers have features for layers of the language model, too.
        features = [output.pooler_output, *output.get("deepstack_features", ())]
        return torch.stack([part.float().sum() for part in features]).sum()

    return model, forward


def measure(world: World, folder: Path, parallel: ParallelConfig, rounds: int) -> tuple[float, int]:
    """Return the best seconds of the tower's forward and backward over a pack, and its parameters on this rank."""
    engine = Engine(ModelShape.from_hf(folder), ModelConfig(path=str(folder)), parallel, world)
    part = engine.load(WeightFolder(folder)).parts[0]
    pack = make_image_pack(engine.shape.vision.merge, engine.shape.vision.patch_dim, SIDES)
    best = float("inf")
    for _ in range(rounds + 1):
        # Both ranks start together, and the slower one counts.
        dist.barrier()
        start = time.perf_counter()
        part._features(pack).sum().backward()
        dist.barrier()
        best = min(best, time.perf_counter() - start)
    return best, sum(parameter.numel() for parameter in part.vision.parameters())


def make_image_pack(merge: int, patch_dim: int, sides: Sequence[tuple[int, int]]) -> Pack:
    """Return a pack of images of random pixels, one after the other."""
    grid = torch.tensor([(1, height, width) for height, width in sides])
    patches = int(grid.prod(-1).sum())
    features = patches // merge**2
    # Only the tower runs: of the language model's inputs just the lengths have to fit.
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
    """Measure one tower alone, or every layout on two ranks, and print JSON rows."""
    if sys.argv[1] in ("ours", "Transformers"):
        print(json.dumps(measure_alone(*sys.argv[1:])), flush=True)
        return
    rounds, family = int(sys.argv[2]), sys.argv[3]
    world = distributed.start(ParallelConfig(), seed=1, threads=1)
    # The first rank makes the folder, and the other learns its name.
    names = [tempfile.mkdtemp() if world.is_main else ""]
    dist.broadcast_object_list(names)
    folder = Path(names[0])
    if world.is_main:
        make_tiny_model(folder, tied=True, seed=1, sizes=SIZES, family=family)
    dist.barrier()  # the model is on disk from here on
    patches = sum(height * width for height, width in SIDES)
    for name, parallel in LAYOUTS.items():
        seconds, parameters = measure(world, folder, parallel, rounds)
        if world.is_main:
            row = {"name": name, "seconds": seconds, "patches": patches, "parameters": parameters}
            print(json.dumps(row), flush=True)
    distributed.finish()


if __name__ == "__main__":
    main()
