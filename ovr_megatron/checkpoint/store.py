"""Saving and resuming a run: weights, optimizers and cursors of a step in one folder.

A checkpoint does not know the layout that wrote it::

    step_000300/
      policy/                a Hugging Face folder: config, tokenizer, processor, weights
      policy-exp_avg/ ...    Adam's moments (and float32 master weights) as safetensors, under the same names
      critic/ ...            likewise, with value_head.weight
      manifest.json          written last: files with hashes, step, the loop's own state
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ovr_megatron.checkpoint.manifest import CheckpointError, newest, read_manifest, write_manifest
from ovr_megatron.engine import Engine
from ovr_megatron.runtime.distributed import World
from ovr_megatron.weights.folder import WeightFolder, WeightWriter, copy_companions


@dataclass(frozen=True)
class Restored:
    """Where a run goes on: the next step and the loop's state as it was saved."""

    path: Path
    step: int
    state: dict[str, Any]


def weights_of(path: str | Path, name: str = "policy") -> Path:
    """The Hugging Face folder behind ``path``: a checkpoint's ``name`` part, or ``path`` itself."""
    inside = Path(path) / name
    return inside if (inside / "config.json").exists() else Path(path)


def _write(directory: Path, tensors: Iterator[tuple[str, Tensor]], world: World) -> None:
    """Stream ``tensors`` to ``directory`` from the first rank; a collective."""
    if not world.is_main:
        for _ in tensors:
            pass
        return
    with WeightWriter(directory) as writer:
        for name, tensor in tensors:
            writer.add(name, tensor.detach().cpu())


def save(
    directory: Path, step: int, engines: dict[str, Engine], companions: Path, state: dict[str, Any], world: World
) -> Path:
    """Write the checkpoint of ``step`` below ``directory``; a collective.

    Args:
        directory: the run's checkpoint folder.
        step: steps or iterations done.
        engines: by name, ``policy`` and perhaps ``critic``.
        companions: the folder whose configuration, tokenizer and processor go along.
        state: the loop's cursors, as JSON.
        world: this process.

    Returns:
        The folder, under its final name.
    """
    final = directory / f"step_{step:06d}"
    partial = directory / f".step_{step:06d}.partial"
    if world.is_main:
        for left_over in (partial, final):
            shutil.rmtree(left_over, ignore_errors=True)
    extra: dict[str, Any] = {"state": state, "optimizers": {}}
    for name, engine in engines.items():
        if world.is_main:
            copy_companions(companions, partial / name, dtype=engine.config.params_dtype)
        _write(partial / name, engine.weights(), world)
        for part in engine.state_kinds:
            _write(partial / f"{name}-{part}", engine.optimizer_state(part), world)
        extra["optimizers"][name] = {"steps": engine.step_count, "parts": list(engine.state_kinds)}
    if world.is_main:
        write_manifest(partial, step, extra)
        partial.rename(final)
    dist.barrier()
    return final


def prune(directory: Path, keep_last: int) -> None:
    """Remove all but the ``keep_last`` newest checkpoints; 0 keeps all."""
    found = sorted(directory.glob("step_*"))
    for old in found[:-keep_last] if keep_last else []:
        shutil.rmtree(old)


def find(directory: Path, world: World) -> Restored | None:
    """The newest whole checkpoint below ``directory``, or None; broken ones are named and skipped.

    The first rank looks (it reads every byte to check the hashes) and tells the others.
    """
    answer: list[Any] = [None]
    if world.is_main:
        found = newest(directory)
        for reason in found.skipped:
            print(f"skipping a checkpoint: {reason}", flush=True)
        answer = [None if found.path is None else str(found.path)]
    dist.broadcast_object_list(answer, src=0)
    if answer[0] is None:
        return None
    path = Path(answer[0])
    manifest = read_manifest(path)
    return Restored(path, manifest.step, manifest.extra["state"])


def restore(found: Restored, engines: dict[str, Engine]) -> None:
    """Load weights and optimizers of ``found`` into ``engines``.

    Raises:
        CheckpointError: the checkpoint lacks one of the engines.
    """
    optimizers = read_manifest(found.path).extra["optimizers"]
    for name, engine in engines.items():
        if name not in optimizers:
            raise CheckpointError(f"{found.path} has no {name}; it was written by another stage, use another run.dir")
        engine.load(WeightFolder(found.path / name))
        parts = {part: WeightFolder(found.path / f"{name}-{part}") for part in optimizers[name]["parts"]}
        engine.load_optimizer_state(parts, optimizers[name]["steps"])
