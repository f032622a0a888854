"""Forward and backward of a cold-start pack at the published shapes, beside Transformers and beside the plan's memory.

On a GPU: of the 3B and the 7B model as many layers as fit, 65,536 tokens in documents of natural length, bfloat16 and
8-bit, every choice of recomputation.  Transformers takes the documents one by one, which pads nothing, with torch's
fused attention and its loss in chunks that are computed again, plainly and compiled.  Elsewhere the miniature goes the
same way in float32.  Weights are random, vision is frozen.  Every measurement has a process of its own.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from ovr_megatron.analysis.apart import MeasurementError, rows_of
from ovr_megatron.analysis.bench import natural_lengths, text_pack
from ovr_megatron.analysis.published import fill, randomise, shape_of, write_model
from ovr_megatron.coldstart.training import cross_entropy
from ovr_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from ovr_megatron.engine import Engine
from ovr_megatron.model.flops import training_flops
from ovr_megatron.model.qwen25vl import DTYPES
from ovr_megatron.plan.activations import Kernels, PackShape, activations
from ovr_megatron.plan.memory import CONTEXT, MARGIN
from ovr_megatron.plan.parameters import model_state
from ovr_megatron.runtime import distributed
from ovr_megatron.runtime.steps import matrix_rate

MEAN_LENGTH = 3700  # tokens of a cold-start sample
RECOMPUTE = ("none", "selective", "full")
CHUNK = 4096  # rows of the rival's loss
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


def rows(
    shapes: Sequence[str], rounds: int, fp8: str, only: str = "", trace: Path | None = None
) -> Iterator[dict[str, Any]]:
    """Measure every step of the table; a rival's failure, or one of ours, is a row that says so.

    Args:
        shapes: presets, or ``tiny``; of those that do not fit as many layers are taken as do.
        rounds: processes of each; the best counts.
        fp8: the scaling recipe of the 8-bit rows on a GPU.
        only: leave out the steps that have not this in their names.
        trace: folder for a trace of each of our steps, for chrome://tracing or Perfetto.
    """
    on_gpu = torch.cuda.is_available()
    lengths = natural_lengths(*((65536, MEAN_LENGTH) if on_gpu else (1024, 64)))
    for shape in shapes:
        plain = Step(OURS, shape, 0, lengths, "bfloat16" if on_gpu else "float32")
        steps = [fitting(replace(plain, recompute=recompute)) for recompute in RECOMPUTE]
        if on_gpu:
            steps += [replace(step, fp8=fp8) for step in steps]
        steps += [replace(steps[i], who=who) for who in (PLAIN, COMPILED) for i in (0, 2)]
        for step in steps:
            if only in step.name:
                yield best(step, rounds, trace if step.who == OURS else None)


def fitting(step: Step) -> Step:
    """``step`` with as many layers as the plan finds room for on this GPU; all of them where there is none."""
    whole = shape_of(step.shape).layers
    if not torch.cuda.is_available():
        return step
    room = torch.cuda.get_device_properties(0).total_memory
    fits = (
        layers
        for layers in range(whole, 0, -1)
        if planned_bytes(replace(step, layers=layers)) + CONTEXT + MARGIN * room <= room
    )
    layers = next(fits, 1)
    return replace(step, layers=0 if layers == whole else layers)


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


def best(step: Step, rounds: int, trace: Path | None = None) -> dict[str, Any]:
    """The best of ``rounds`` processes as a row; ``failed`` says why one of them ended."""
    row: dict[str, Any] = {"name": step.name, **asdict(step), "tokens": sum(step.lengths)}
    row["documents"], row["lengths"] = len(step.lengths), None
    for _ in range(rounds):
        try:
            (found,) = rows_of(__name__, json.dumps(asdict(step)), *([trace] if trace else []))
        except MeasurementError as error:
            return row | {"failed": str(error)}
        if found["seconds"] < row.get("seconds", float("inf")):
            row |= found
    return row


def measure(step: Step, trace: Path | None, repeats: int = 3, at_least: float = 3.0) -> dict[str, Any]:
    """Seconds, FLOP/s and peak bytes of one forward and backward in this process, after one that warms up.

    Of one more, if ``trace`` names a folder, a trace and what it shows: see `profile`.
    """
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
    return found | (profile(work, trace, step.name) if trace else {})


def profile(work: Callable[[], object], folder: Path, name: str) -> dict[str, Any]:
    """Trace ``work`` once into ``folder``.

    Returns:
        Nothing without a GPU, else
        ``launches`` of kernels, ``waits`` of the host for the device, the share of the time in which the device was
        ``busy``, and ``kernels``: the names of those that took longest, and their seconds.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        began = time.perf_counter()
        work()
        torch.cuda.synchronize() if torch.cuda.is_available() else None
        spent = time.perf_counter() - began
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / f"{re.sub('[^a-zA-Z0-9]+', '_', name)}.json.gz"))
    if not torch.cuda.is_available():
        return {}
    events = profiler.key_averages()
    kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    on_device = sorted(kernels, key=lambda e: -e.self_device_time_total)
    counts = {e.key: e.count for e in events}
    return {
        "launches": sum(count for key, count in counts.items() if "LaunchKernel" in key),
        "waits": sum(count for key, count in counts.items() if "Synchronize" in key) - 2,  # ours and the profiler's own
        "busy": sum(e.self_device_time_total for e in on_device) / 1e6 / spent,
        "kernels": {e.key[:80]: e.self_device_time_total / 1e6 for e in on_device[:20]},
    }


def _ours(step: Step) -> Callable[[], object]:
    world = distributed.start(ParallelConfig(), seed=1, threads=0 if torch.cuda.is_available() else 1)
    shape = shape_of(step.shape, step.layers)
    engine = Engine(shape, model_of(step), ParallelConfig(), world).with_optimizer(OptimizerConfig(), 1)
    fill(engine)
    pack = text_pack(step.lengths)
    engine.train([pack], cross_entropy)  # so that the optimizer holds all that it will
    torch.cuda.reset_peak_memory_stats() if torch.cuda.is_available() else None
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
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
            parts = zip(hidden.split(CHUNK), ids[0, 1:].split(CHUNK), strict=True)
            torch.stack([checkpoint(loss, *part, use_reentrant=False) for part in parts]).sum().backward()

    def loss(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model.lm_head(hidden).float(), labels, reduction="sum")

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
    if "launches" in row:
        line += f"\n    {row['launches']:,} launches, {row['waits']} waits, busy {row['busy']:.1%}"
        line += "".join(f"\n    {seconds:9.4f} s  {kernel}" for kernel, seconds in row["kernels"].items())
    return line


HEADER = f"{'':68}{'tokens/s':>10}{'seconds':>9}{'TFLOP/s':>9}{'MFU':>7}{'peak GiB':>9}{'plan':>9}{'off by':>8}"


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    print(json.dumps(measure(Step(**given | {"lengths": tuple(given["lengths"])}), folder)))
