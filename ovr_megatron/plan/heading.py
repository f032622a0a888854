"""The heading of a run: what it is about to do, in one block that it prints before its first step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch

from ovr_megatron.config import ColdStartConfig, RLConfig
from ovr_megatron.data.repetition import show_uses, source_uses
from ovr_megatron.engine import Engine
from ovr_megatron.plan import search
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.terminal import printable
from ovr_megatron.weights.table import TensorRow

Rows = list[tuple[str, str]]


def show_heading(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Return ``rows`` of name and text as a block under ``title``, texts below one another.

    A text is one line: what a file or a setting brings into it cannot break the block or steer the terminal.
    """
    width = max(len(name) for name, _ in rows)
    lines = [title]
    for name, text in rows:
        one_line = printable(text).replace("\n", " ")
        lines.append(f"  {name:{width}}  {one_line}")
    return "\n".join(lines)


def run_rows(
    config: ColdStartConfig | RLConfig,
    engines: Mapping[str, Engine],
    world: World,
    resumed: tuple[Path, int] | None,
) -> Rows:
    """Return the rows of both stages: models and layouts, devices, precision and layers, start or resume.

    Args:
        config: with the steps that will be taken.
        engines: by name, those that train.
        world: this process.
        resumed: the checkpoint that the run goes on from, and its step; None for a fresh start.
    """
    rows = [(name, describe_model(engine)) for name, engine in engines.items()]
    if isinstance(config, RLConfig):
        total = config.iterations
        unit = "iteration"
    else:
        total = config.steps
        unit = "step"
    device = "CPU"
    if world.device.type == "cuda":
        device = torch.cuda.get_device_properties(0).name
    # Precision and layers are settings of the recipe: every engine has the same.
    first_engine = next(iter(engines.values()))
    precision = describe_precision(config, first_engine)
    devices = f"{world.size} x {device}, {precision}"
    rows.append(("device", devices))
    if resumed:
        checkpoint, step = resumed
        progress = f"after {unit} {step:,} of {total:,}, from {checkpoint}"
        rows.append(("resumes", progress))
    else:
        start = f"from the weights of {initial_weights(config)}; {total:,} {unit}s to do"
        rows.append(("starts", start))
    return rows


def initial_weights(config: ColdStartConfig | RLConfig) -> str:
    """Return the folder from whose weights the model that trains begins."""
    if isinstance(config, RLConfig) and config.only == "critic":
        return config.critic.path or config.model.path
    return config.model.path


def describe_model(engine: Engine) -> str:
    """Return how many parameters train, and the layout."""
    trained = count(engine.trained_rows)
    total = count(engine.live.rows)
    layout = search.name(engine.parallel, "")
    replicas = engine.groups.dp.size()
    share = "all" if trained == total else f"{trained:,}"
    return f"{share} of {total:,} parameters train; layout {layout}, {replicas} data-parallel"


def count(rows: Sequence[TensorRow]) -> int:
    """Return the number of weights in ``rows`` of the table."""
    total = 0
    for row in rows:
        for size in row.sizes:
            total += math.prod(size)
    return total


def describe_precision(config: ColdStartConfig | RLConfig, engine: Engine) -> str:
    """Return precision, layers and recomputation."""
    model = config.model
    # `model.layers=auto` leaves the choice to the machine: only the modules themselves show it.
    fused = any(_has_transformer_engine(part) for part in engine.parts)
    layers = "layers of this project"
    if fused:
        version = metadata.version("transformer-engine")
        layers = f"Transformer Engine {version}"
    fp8 = ""
    if model.fp8 != "none":
        fp8 = f" with FP8 {model.fp8}"
    return f"{model.dtype}{fp8}, {layers}, recompute {model.recompute}"


def _has_transformer_engine(part: torch.nn.Module) -> bool:
    for module in part.modules():
        package = type(module).__module__
        if "transformer_engine" in package:
            return True
    return False


def source_rows(config: ColdStartConfig | RLConfig, samples: float) -> Rows:
    """Return a row for each finite source: how often ``samples`` draws repeat it."""
    uses = source_uses(config.data, samples)
    return [("source", line) for line in show_uses(uses)]
