"""Seconds that a save holds training up on two ranks: all files by the first rank, by every rank, in the background.

``torchrun --nproc-per-node 2 -m ovr_megatron.analysis.bench_save ROUNDS`` prints one JSON row for each way.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ovr_megatron.checkpoint import store
from ovr_megatron.checkpoint.manifest import write_manifest
from ovr_megatron.checkpoint.writing import DiskQueue
from ovr_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from ovr_megatron.engine import Engine
from ovr_megatron.model.shape import ModelShape
from ovr_megatron.model.tiny import TinySizes, make_tiny_model
from ovr_megatron.runtime import distributed
from ovr_megatron.runtime.distributed import World
from ovr_megatron.weights.folder import SHARD_BYTES, WeightFolder, WeightWriter, copy_hf_assets

SIZES = TinySizes(hidden=1024, heads=8, kv_heads=2, ffn=4096, layers=4)


def rows(rounds: int) -> list[dict[str, Any]]:
    """Start the two processes and collect their rows."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, "-m", __name__, str(rounds)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def show(found: Sequence[dict[str, Any]]) -> str:
    """The rows as a table of text; ``ratio`` is the first row's waiting over the row's."""
    lines = [f"{'':22}{'MB':>7}{'waiting s':>11}{'in all s':>10}{'ratio':>7}"]
    for row in found:
        line = f"{row['name']:22}{row['bytes'] / 1e6:7.0f}{row['waiting']:11.3f}{row['seconds']:10.3f}"
        lines.append(f"{line}{found[0]['waiting'] / row['waiting']:7.2f}")
    return "\n".join(lines)


def first_rank(out: Path, engine: Engine, companions: Path, world: World) -> float:
    """The rival: the first rank takes every tensor and writes every file, then hashes them; returns the waiting."""
    began = time.perf_counter()
    if world.is_main:
        copy_hf_assets(companions, out / "policy", dtype=engine.config.params_dtype)
    for part in store.folders_of({"policy": engine}):
        if world.is_main:
            with WeightWriter(out / part.folder) as writer:
                for name, tensor in part.tensors():
                    writer.add(name, tensor)
        else:
            for _ in part.tensors():
                pass
    if world.is_main:
        write_manifest(out, 1)
    dist.barrier()
    return time.perf_counter() - began


def every_rank(out: Path, engine: Engine, companions: Path, world: World) -> float:
    """Every rank writes its share; returns the waiting, which is all of it."""
    began = time.perf_counter()
    store.save(out, 1, {"policy": engine}, companions, {}, world)
    return time.perf_counter() - began


def background(out: Path, engine: Engine, companions: Path, world: World) -> float:
    """Every rank writes its share in the background; returns the waiting: for the copies, and to publish."""
    began = time.perf_counter()
    queue = DiskQueue(4 * SHARD_BYTES)
    save = store.start_save(out, 1, {"policy": engine}, companions, {}, world, queue)
    dist.barrier()
    waiting = time.perf_counter() - began
    while save.running:
        time.sleep(0.001)
    dist.barrier()
    began = time.perf_counter()
    store.finish_save(save, world)
    return waiting + time.perf_counter() - began


WAYS: dict[str, Callable[[Path, Engine, Path, World], float]] = {
    "first rank writes all": first_rank,
    "every rank its share": every_rank,
    "in the background": background,
}


def main() -> None:
    """Measure every way in turn; the best of the rounds counts."""
    world = distributed.start(ParallelConfig(), seed=1, threads=1)
    box = [tempfile.mkdtemp() if world.is_main else ""]
    dist.broadcast_object_list(box)
    folder, out = Path(box[0]) / "model", Path(box[0]) / "out"
    if world.is_main:
        make_tiny_model(folder, tied=True, seed=1, sizes=SIZES)
    dist.barrier()
    engine = Engine(ModelShape.from_hf(folder), ModelConfig(path=str(folder)), ParallelConfig(), world)
    engine.with_optimizer(OptimizerConfig(), 1).load(WeightFolder(folder))
    engine.load_optimizer_state({}, 1)
    best: dict[str, tuple[float, float]] = {}
    for name in [*WAYS] * int(sys.argv[1]):
        dist.barrier()
        began = time.perf_counter()
        waiting = WAYS[name](out, engine, folder, world)
        found = (waiting, time.perf_counter() - began)
        best[name] = min(best.get(name, found), found)
        if world.is_main:
            shutil.rmtree(out)
        dist.barrier()
    if world.is_main:
        written = sum(size for part in store.folders_of({"policy": engine}) for size in part.sizes.values())
        for name, (waiting, seconds) in best.items():
            print(json.dumps({"name": name, "bytes": written, "waiting": waiting, "seconds": seconds}), flush=True)
        shutil.rmtree(box[0])
    distributed.finish()


if __name__ == "__main__":
    main()
