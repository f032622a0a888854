"""Forward and backward of a cold-start pack at the published shapes, beside Transformers and beside the plan's memory.

On a GPU: the 3B model whole and the 7B model with as many layers as fit, 65,536 tokens in documents of natural length,
bfloat16 and 8-bit, every choice of recomputation.  Transformers takes the documents one by one, which pads nothing,
with torch's fused attention, plainly and compiled.  Elsewhere the miniature goes the same way in float32.  Weights are
random, vision is frozen.  Every measurement has a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from ovr_megatron.analysis.bench import natural_lengths, text_pack
from ovr_megatron.analysis.published import fill, randomise, shape_of, write_model
from ovr_megatron.coldstart import cross_entropy
from ovr_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from ovr_megatron.engine import Engine
from ovr_megatron.model.flops import training_flops
from ovr_megatron.model.presets import PRESETS
from ovr_megatron.model.qwen25vl import DTYPES
from ovr_megatron.plan.activations import Kernels, PackShape, activations
from ovr_megatron.plan.memory import CONTEXT, MARGIN
from ovr_megatron.plan.parameters import model_state
from ovr_megatron.runtime import distributed
from ovr_megatron.runtime.steps import matrix_rate

MEAN_LENGTH = 3700  # tokens of a cold-start sample
RECOMPUTE = ("none", "selective", "full")
SHAPES = ("tiny", *PRESETS)
OURS, PLAIN, COMPILED = "ours", "Transformers", "Transformers, compiled"


@dataclass(frozen=True)
class Step:
    """One measurement: ``shape`` is a preset or ``tiny``, ``layers`` of it (0: all), ``lengths`` of the documents."""

    who: str
    shape: str
    layers: int
    lengths: tuple[int, ...]
    dtype: str
    fp8: str = "none"
    recompute: str = "none"

    @property
    def name(self) -> str:
        """As a row is called."""
        depth = f", {self.layers} layers" if self.layers else ""
        precision = self.dtype if self.fp8 == "none" else f"fp8 {self.fp8}"
        return f"{self.shape}{depth}, {self.who}, {precision}, recompute {self.recompute}"


def rows(shapes: Sequence[str], rounds: int, fp8: str, only: str = "") -> Iterator[dict[str, Any]]:
    """Measure every step of the table; a rival's failure, or one of ours, is a row that says so.

    Args:
        shapes: presets, or ``tiny``; of those that do not fit as many layers are taken as do.
        rounds: processes of each; the best counts.
        fp8: the scaling recipe of the 8-bit rows on a GPU.
        only: leave out the steps that have not this in their names.
    """
    on_gpu = torch.cuda.is_available()
    lengths = natural_lengths(*((65536, MEAN_LENGTH) if on_gpu else (1024, 64)))
    for shape in shapes:
        plain = Step(OURS, shape, fitting_layers(shape, lengths), lengths, "bfloat16" if on_gpu else "float32")
        steps = [replace(plain, recompute=recompute) for recompute in RECOMPUTE]
        if on_gpu:
            steps += [replace(step, fp8=fp8) for step in steps]
        steps += [replace(plain, who=who, recompute=r) for who in (PLAIN, COMPILED) for r in ("none", "full")]
        for step in steps:
            if only in step.name:
                yield best(step, rounds)


def fitting_layers(name: str, lengths: Sequence[int]) -> int:
    """Layers of the model for which the plan finds room on this GPU without recomputation; 0: all, or no GPU."""
    shape = shape_of(name)
    if not torch.cuda.is_available():
        return 0
    room = torch.cuda.get_device_properties(0).total_memory
    for layers in range(shape.layers, 0, -1):
        step = Step(OURS, name, layers, tuple(lengths), "bfloat16")
        if planned_bytes(step) + CONTEXT + MARGIN * room <= room:
            return 0 if layers == shape.layers else layers
    return 1


def planned_bytes(step: Step) -> int:
    """What the plan has for model, gradients, optimizer and the activations of one pack."""
    shape = shape_of(step.shape, step.layers)
    model, alone = model_of(step), ParallelConfig()
    total = sum(step.lengths)
    kernels = None if torch.cuda.is_available() else Kernels("local", "cpu")
    kept = activations(shape, model, alone, PackShape(total, total), kernels=kernels)
    return model_state(shape, model, alone, 1).total + kept.peak


def model_of(step: Step) -> ModelConfig:
    """The step's settings of the model."""
    settings = {"dtype": step.dtype, "fp8": step.fp8, "recompute": step.recompute}
    return ModelConfig(path=step.shape, freeze_vision=True, freeze_merger=True, **settings)  # type: ignore[arg-type]


def best(step: Step, rounds: int) -> dict[str, Any]:
    """The best of ``rounds`` processes as a row; ``failed`` has the last line of one that failed."""
    row: dict[str, Any] = {"name": step.name, **asdict(step), "tokens": sum(step.lengths)}
    row["documents"], row["lengths"] = len(step.lengths), None
    for _ in range(rounds):
        command = [sys.executable, "-m", __name__, json.dumps(asdict(step))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return row | {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
        found = json.loads(done.stdout.splitlines()[-1])
        if found["seconds"] < row.get("seconds", float("inf")):
            row |= found
    return row


def measure(step: Step, repeats: int = 3, at_least: float = 3.0) -> dict[str, Any]:
    """Seconds, FLOP/s and peak bytes of one forward and backward in this process, after one that warms up."""
    on_gpu = torch.cuda.is_available()
    work = _ours(step) if step.who == OURS else _theirs(step)
    seconds: list[float] = []
    while len(seconds) < repeats + 1 or sum(seconds[1:]) < at_least:
        began = time.perf_counter()
        work()
        torch.cuda.synchronize() if on_gpu else None
        seconds.append(time.perf_counter() - began)
    shape = shape_of(step.shape, step.layers)
    rate = training_flops(shape, step.lengths) / min(seconds[1:])
    reachable = matrix_rate(DTYPES[step.dtype])
    found = {"seconds": min(seconds[1:]), "tokens_per_second": sum(step.lengths) / min(seconds[1:])}
    found |= {"tflops": rate / 1e12, "matrix_tflops": reachable / 1e12, "mfu": rate / reachable}
    if on_gpu:
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
        if step.who == OURS:
            found["planned_bytes"] = planned_bytes(step)
    return found


def _ours(step: Step) -> Callable[[], object]:
    world = distributed.start(ParallelConfig(), seed=1, threads=0 if torch.cuda.is_available() else 1)
    shape = shape_of(step.shape, step.layers)
    engine = Engine(shape, model_of(step), ParallelConfig(), world).with_optimizer(OptimizerConfig(), 1)
    fill(engine)
    pack = text_pack(step.lengths)
    return lambda: engine.backward([pack], cross_entropy)


def _theirs(step: Step) -> Callable[[], object]:
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = AutoConfig.from_pretrained(write_model(step.shape, Path(folder), step.layers))
    with torch.device("cuda" if on_gpu else "cpu"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(
            config, dtype=DTYPES[step.dtype], attn_implementation="sdpa"
        ).train()
    randomise(model.parameters())
    model.model.visual.requires_grad_(False)
    if step.recompute == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    language: Any = model.model.language_model
    if step.who == COMPILED:
        language.compile(dynamic=True)
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, 256, (1, n), generator=generator).to(model.device) for n in step.lengths]

    def work() -> None:
        model.zero_grad(set_to_none=True)
        for ids in documents:
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            F.cross_entropy(logits.float(), ids[0, 1:], reduction="sum").backward()

    return work


def show(row: dict[str, Any]) -> str:
    """A row as a line below `HEADER`."""
    if "failed" in row:
        return f"{row['name']:68} failed: {row['failed']}"
    line = (
        f"{row['name']:68}{row['tokens_per_second']:10,.0f}{row['seconds']:9.3f}{row['tflops']:9.2f}{row['mfu']:7.1%}"
    )
    if "peak_bytes" in row:
        line += f"{row['peak_bytes'] / 2**30:9.2f}"
    if "planned_bytes" in row:
        line += f"{row['planned_bytes'] / 2**30:9.2f}{row['planned_bytes'] / row['peak_bytes'] - 1:+8.1%}"
    return line


HEADER = f"{'':68}{'tokens/s':>10}{'seconds':>9}{'TFLOP/s':>9}{'MFU':>7}{'peak GiB':>9}{'plan':>9}{'off by':>8}"


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(measure(Step(**given | {"lengths": tuple(given["lengths"])}))))
