"""Measure a cold-start pack at the published shapes, forward and backward, beside Transformers and the plan's memory.

On a GPU: of the 3B and the 7B model as many layers as fit, 65,536 tokens in documents of natural length, bfloat16 and
FP8, every choice of recomputation.  Transformers takes the documents one by one, so that nothing is padded, with
torch's fused attention and its loss in chunks that are recomputed; plain and compiled.  Without a GPU the miniature is
measured in the same way in float32.  Weights are random, vision is frozen.  Every measurement runs in a new process.
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
from transformers import AutoConfig

from benchmarks.model import make_text_pack, sample_lengths
from benchmarks.random_models import randomise, randomise_engine, read_shape, write_model
from benchmarks.subprocess_bench import BenchRow, MeasurementError, run_in_subprocess
from ovr_megatron.coldstart.step_trainer import cross_entropy
from ovr_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from ovr_megatron.engine import Engine
from ovr_megatron.families import family_of
from ovr_megatron.model.flops import training_flops
from ovr_megatron.model.transformer_config import DTYPES
from ovr_megatron.plan.activations import PackShape, activations
from ovr_megatron.plan.layer import Kernels
from ovr_megatron.plan.memory import CONTEXT, MARGIN
from ovr_megatron.plan.parameters import model_state
from ovr_megatron.runtime import distributed
from ovr_megatron.runtime.steps import matrix_rate

MEAN_LENGTH = 3700  # tokens of a cold-start sample
RECOMPUTE = ("none", "selective", "full")
CHUNK = 4096  # rows of the rival's loss
OURS = "ours"
PLAIN = "Transformers"
COMPILED = "Transformers, compiled"


@dataclass(frozen=True)
class StepCase:
    """One measurement: ``shape`` is a preset or ``tiny``, ``layers`` of it (0: all), ``lengths`` of the documents."""

    who: str  # OURS, PLAIN or COMPILED; the field is a key of the rows
    shape: str
    layers: int
    lengths: tuple[int, ...]
    dtype: str
    fp8: str = "none"
    recompute: str = "none"

    @property
    def name(self) -> str:
        """Name of the row."""
        depth = f", {self.layers} layers" if self.layers else ""
        precision = self.dtype if self.fp8 == "none" else f"FP8 {self.fp8}"
        return f"{self.shape}{depth}, {self.who}, {precision}, recompute {self.recompute}"


def run(shapes: Sequence[str], rounds: int, fp8: str, only: str = "", trace: Path | None = None) -> Iterator[BenchRow]:
    """Measure every case of the table; a rival's failure, or one of ours, is a row that says so.

    Args:
        shapes: presets, or ``tiny``; of those that do not fit, as many layers are taken as do.
        rounds: processes of each case; the best counts.
        fp8: the scaling recipe of the FP8 rows on a GPU.
        only: leave out the cases that do not have this in their names.
        trace: folder for a trace of each of our cases, for chrome://tracing or Perfetto.
    """
    for shape in shapes:
        for case in _make_cases(shape, fp8):
            if only in case.name:
                yield measure_best(case, rounds, trace if case.who == OURS else None)


def _make_cases(shape: str, fp8: str) -> list[StepCase]:
    """Return our cases, then the rival's: of each of its two kinds without recomputation and with all of it."""
    on_gpu = torch.cuda.is_available()
    lengths = sample_lengths(65536, MEAN_LENGTH) if on_gpu else sample_lengths(1024, 64)
    plain = StepCase(OURS, shape, 0, lengths, "bfloat16" if on_gpu else "float32")
    by_recompute = {recompute: fit_layers(replace(plain, recompute=recompute)) for recompute in RECOMPUTE}
    cases = list(by_recompute.values())
    if on_gpu:
        cases += [replace(case, fp8=fp8) for case in cases]
    for rival in (PLAIN, COMPILED):
        # As many layers as ours have: those are what the two are compared by.
        cases += [replace(by_recompute[recompute], who=rival) for recompute in ("none", "full")]
    return cases


def fit_layers(case: StepCase) -> StepCase:
    """Return ``case`` with as many layers as fit on this GPU by the plan, at least one; without a GPU with all."""
    if not torch.cuda.is_available():
        return case
    all_layers = read_shape(case.shape).layers
    gpu_bytes = torch.cuda.get_device_properties(0).total_memory
    layers = all_layers
    while layers > 1:
        needed_bytes = planned_bytes(replace(case, layers=layers)) + CONTEXT + MARGIN * gpu_bytes
        if needed_bytes <= gpu_bytes:
            break
        layers -= 1
    return replace(case, layers=0 if layers == all_layers else layers)


def planned_bytes(case: StepCase) -> int:
    """Return what the plan expects of model, gradients, optimizer and the activations of one pack."""
    shape = read_shape(case.shape, case.layers)
    model = make_model_config(case)
    one_rank = ParallelConfig()
    tokens = sum(case.lengths)
    kernels = None if torch.cuda.is_available() else Kernels("local", "cpu")
    stored = activations(shape, model, one_rank, PackShape(tokens, tokens), kernels=kernels)
    return model_state(shape, model, one_rank, 1).total + stored.peak


def make_model_config(case: StepCase) -> ModelConfig:
    """Return the settings of the model."""
    settings = {"dtype": case.dtype, "fp8": case.fp8, "recompute": case.recompute}
    return ModelConfig(path=case.shape, freeze_vision=True, freeze_merger=True, **settings)  # type: ignore[arg-type]


def measure_best(case: StepCase, rounds: int, trace: Path | None = None) -> BenchRow:
    """Measure ``case`` in ``rounds`` processes, and return the row of the best; ``failed`` says why a process ended."""
    row: BenchRow = {"name": case.name, **asdict(case), "tokens": sum(case.lengths)}
    row["documents"] = len(case.lengths)
    row["lengths"] = None
    for _ in range(rounds):
        try:
            arguments = [json.dumps(asdict(case)), *([trace] if trace else [])]
            (result,) = run_in_subprocess(__name__, *arguments)
        except MeasurementError as error:
            return row | {"failed": str(error)}
        if result["seconds"] < row.get("seconds", float("inf")):
            row |= result
    return row


def measure(case: StepCase, trace: Path | None, repeats: int = 3, at_least: float = 3.0) -> BenchRow:
    """Measure seconds, FLOP/s and peak bytes of one forward and backward in this process, after one that warms up.

    If ``trace`` names a folder, one more is traced into it: see `profile`.
    """
    on_gpu = torch.cuda.is_available()
    run_once = _build_ours(case) if case.who == OURS else _build_transformers(case)
    seconds: list[float] = []
    while len(seconds) < repeats + 1 or sum(seconds[1:]) < at_least:
        start = time.perf_counter()
        run_once()
        _wait_for_device()
        seconds.append(time.perf_counter() - start)
    best = min(seconds[1:])
    rate = training_flops(read_shape(case.shape, case.layers), case.lengths) / best
    reachable = matrix_rate(DTYPES[case.dtype])
    row = {"seconds": best, "tokens_per_second": sum(case.lengths) / best}
    row |= {"tflops": rate / 1e12, "matrix_tflops": reachable / 1e12, "mfu": rate / reachable}
    if on_gpu:
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
        if case.who == OURS:
            row["planned_bytes"] = planned_bytes(case)
    return row | (profile(run_once, trace, case.name) if trace else {})


def _wait_for_device() -> None:
    """Wait until the GPU is done: kernels run after the calls that launch them have returned."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def profile(run_once: Callable[[], object], folder: Path, name: str) -> BenchRow:
    """Trace ``run_once`` into ``folder``.

    Returns:
        Nothing without a GPU, else ``launches`` of kernels, ``waits`` of the host for the device, the share of the time
        in which the device was ``busy``, and ``kernels``: the names of those that took longest, and their seconds.
    """
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        start = time.perf_counter()
        run_once()
        _wait_for_device()
        seconds = time.perf_counter() - start
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / f"{re.sub('[^a-zA-Z0-9]+', '_', name)}.json.gz"))
    if not on_gpu:
        return {}
    events = profiler.key_averages()
    kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    kernels = sorted(kernels, key=lambda kernel: -kernel.self_device_time_total)
    kernel_seconds = {kernel.key[:80]: kernel.self_device_time_total / 1e6 for kernel in kernels[:20]}
    counts = {event.key: event.count for event in events}
    return {
        "launches": sum(count for key, count in counts.items() if "LaunchKernel" in key),
        # Two of the waits are the one above and one of the profiler.
        "waits": sum(count for key, count in counts.items() if "Synchronize" in key) - 2,
        "busy": sum(kernel.self_device_time_total for kernel in kernels) / 1e6 / seconds,
        "kernels": kernel_seconds,
    }


def _build_ours(case: StepCase) -> Callable[[], object]:
    """Return a function that runs our forward and backward once."""
    world = distributed.start(ParallelConfig(), seed=1, threads=0 if torch.cuda.is_available() else 1)
    shape = read_shape(case.shape, case.layers)
    engine = Engine(shape, make_model_config(case), ParallelConfig(), world).with_optimizer(OptimizerConfig(), 1)
    randomise_engine(engine)
    pack = make_text_pack(case.lengths, shape.vision.patch_dim)
    # The optimizer makes its state in the first step: the peak must hold it, and not that step itself.
    engine.train([pack], cross_entropy)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return lambda: engine.backward([pack], cross_entropy)


def _build_transformers(case: StepCase) -> Callable[[], object]:
    """Return a function that runs Transformers' forward and backward once, document by document."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = AutoConfig.from_pretrained(write_model(case.shape, Path(folder), case.layers))
    model_class = family_of(read_shape(case.shape, case.layers)).load_hf_class()
    with torch.device("cuda" if on_gpu else "cpu"):
        model = model_class._from_config(config, dtype=DTYPES[case.dtype], attn_implementation="sdpa").train()
    randomise(model.parameters())
    model.model.visual.requires_grad_(False)
    if case.recompute == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    language: Any = model.model.language_model
    if case.who == COMPILED:
        language.compile(dynamic=True)  # the lengths of the documents differ
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, 256, (1, n), generator=generator).to(model.device) for n in case.lengths]

    def run_once() -> None:
        model.zero_grad(set_to_none=True)
        for ids in documents:
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
            chunks = zip(hidden.split(CHUNK), ids[0, 1:].split(CHUNK), strict=True)
            # Recomputed in the backward pass, so that the logits of one chunk at most are in memory.
            torch.stack([checkpoint(sum_loss, *chunk, use_reentrant=False) for chunk in chunks]).sum().backward()

    def sum_loss(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model.lm_head(hidden).float(), labels, reduction="sum")

    return run_once


def format_row(row: BenchRow) -> str:
    """Return a row as a line below `HEADER`."""
    if "failed" in row:
        return f"{row['name']:68} failed: {row['failed']}"
    line = f"{row['name']:68}{row['tokens_per_second']:10,.0f}{row['seconds']:9.3f}"
    line += f"{row['tflops']:9.2f}{row['mfu']:7.1%}"
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
    fields = json.loads(sys.argv[1])
    fields["lengths"] = tuple(fields["lengths"])  # JSON has no tuples
    trace_folder = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    print(json.dumps(measure(StepCase(**fields), trace_folder)))
