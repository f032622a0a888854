"""Measure how long a save holds two ranks up: all files by the first rank, by every rank, in the background.

``torchrun --nproc-per-node 2 -m benchmarks.save ROUNDS`` prints one JSON row for each way.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

from benchmarks.subprocess_bench import BenchRow, run_in_subprocess
from ovr_megatron.checkpoint import store
from ovr_megatron.checkpoint.manifest import write_manifest
from ovr_megatron.checkpoint.writing import DiskQueue
from ovr_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from ovr_megatron.engine import Engine
from ovr_megatron.families import ModelShape
from ovr_megatron.families.tiny import TinySizes
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.runtime import distributed
from ovr_megatron.runtime.distributed import World
from ovr_megatron.weights.folder import SHARD_BYTES, WeightFolder, WeightWriter, copy_hf_assets

SIZES = TinySizes(hidden=1024, heads=8, kv_heads=2, ffn=4096, layers=4)


def run(rounds: int) -> list[BenchRow]:
    """Start the two processes and return the rows that they print."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return run_in_subprocess(__name__, rounds, launcher=launcher)


def format_table(rows: Sequence[BenchRow]) -> str:
    """Return the rows as a table of text; ``ratio`` is the first row's waiting over the row's."""
    lines = [f"{'':22}{'MB':>7}{'waiting s':>11}{'in all s':>10}{'ratio':>7}"]
    for row in rows:
        line = f"{row['name']:22}{row['bytes'] / 1e6:7.0f}{row['waiting']:11.3f}{row['seconds']:10.3f}"
        lines.append(f"{line}{rows[0]['waiting'] / row['waiting']:7.2f}")
    return "\n".join(lines)


def save_by_first_rank(out: Path, engine: Engine, hf_assets: Path, world: World) -> float:
    """Save as the rival does: the first rank gathers every tensor, writes every file and hashes them.

    Returns:
        Seconds that training waits.
    """
    start = time.perf_counter()
    if world.is_main:
        copy_hf_assets(hf_assets, out / "policy", dtype=engine.config.params_dtype)
    for part in store.folders_of({"policy": engine}):
        if world.is_main:
            with WeightWriter(out / part.folder) as writer:
                for name, tensor in part.tensors():
                    writer.add(name, tensor)
        else:
            # Gathering a tensor is a collective: the other ranks have to take part for each of them.
            for _ in part.tensors():
                pass
    if world.is_main:
        write_manifest(out, 1)
    dist.barrier()
    return time.perf_counter() - start


def save_by_every_rank(out: Path, engine: Engine, hf_assets: Path, world: World) -> float:
    """Save with every rank writing its share, and return the seconds that training waits: all of them."""
    start = time.perf_counter()
    store.save(out, 1, {"policy": engine}, hf_assets, {}, world)
    return time.perf_counter() - start


def save_in_background(out: Path, engine: Engine, hf_assets: Path, world: World) -> float:
    """Save with every rank writing its share in the background.

    Returns:
        Seconds that training waits: while weights are copied, and while the checkpoint is published.
    """
    start = time.perf_counter()
    queue = DiskQueue(4 * SHARD_BYTES)
    save = store.start_save(out, 1, {"policy": engine}, hf_assets, {}, world, queue)
    dist.barrier()
    waiting = time.perf_counter() - start
    # Training would go on here.
    while save.running:
        time.sleep(0.001)
    # Outside of both measurements: a rank that is done first must not count its wait for the other.
    dist.barrier()
    start = time.perf_counter()
    store.finish_save(save, world)
    return waiting + time.perf_counter() - start


METHODS: dict[str, Callable[[Path, Engine, Path, World], float]] = {
    "first rank writes all": save_by_first_rank,
    "every rank its share": save_by_every_rank,
    "in the background": save_in_background,
}


def main() -> None:
    """Measure the methods in turn; the best of the rounds counts."""
    world = distributed.start(ParallelConfig(), seed=1, threads=1)
    # The first rank makes the folder, and the other learns its name.
    names = [tempfile.mkdtemp() if world.is_main else ""]
    dist.broadcast_object_list(names)
    root = Path(names[0])
    folder = root / "model"
    out = root / "out"
    if world.is_main:
        make_tiny_model(folder, tied=True, seed=1, sizes=SIZES)
    dist.barrier()  # the model is on disk from here on
    engine = Engine(ModelShape.from_hf(folder), ModelConfig(path=str(folder)), ParallelConfig(), world)
    engine.with_optimizer(OptimizerConfig(), 1).load(WeightFolder(folder))
    engine.load_optimizer_state({}, 1)  # no state is read, but its tensors are there to be saved
    best: dict[str, tuple[float, float]] = {}
    # In turns, so that a busy moment of the disk does not hit a single method.
    for name in [*METHODS] * int(sys.argv[1]):
        dist.barrier()
        start = time.perf_counter()
        waiting = METHODS[name](out, engine, folder, world)
        times = (waiting, time.perf_counter() - start)
        best[name] = min(best.get(name, times), times)
        if world.is_main:
            shutil.rmtree(out)
        dist.barrier()  # the next save finds no old files
    if world.is_main:
        size = sum(sum(part.sizes.values()) for part in store.folders_of({"policy": engine}))
        for name, (waiting, seconds) in best.items():
            print(json.dumps({"name": name, "bytes": size, "waiting": waiting, "seconds": seconds}), flush=True)
        shutil.rmtree(root)
    distributed.finish()


if __name__ == "__main__":
    main()
