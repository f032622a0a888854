"""Gather each rank's figures of a step and turn them into metrics: rates, waiting, stragglers, memory."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ovr_megatron.runtime.distributed import World

_GIB = 2**30


@dataclass(frozen=True)
class RankStep:
    """One rank's figures of a step.

    Attributes:
        data_seconds: wait for its packs.
        compute_seconds: forward and backward passes until the replicas synchronise, see `ComputeTimer`.
        flops: FLOP of its replica, on the replica's first rank, else 0.
        peak_bytes: peak memory of its device (of the process, on a CPU).
        host_bytes: peak host memory of its process.
        documents: losses of its documents, which the loop merges.
    """

    data_seconds: float
    compute_seconds: float
    flops: float
    peak_bytes: int
    host_bytes: int
    documents: tuple[Any, ...] = ()


class ComputeTimer:
    """Measures the seconds between `start` and `stop`, on a GPU by events, for which the host does not wait."""

    def __init__(self) -> None:
        self.on_device = torch.cuda.is_available()
        self.marks: list[Any] = []

    def start(self) -> None:
        """Record the start time."""
        self.marks = [self._now()]

    def stop(self) -> None:
        """Record the end time. A later call overwrites it."""
        self.marks[1:] = [self._now()]

    @property
    def seconds(self) -> float:
        """The measured seconds; the device must have caught up, as it has at the end of a step."""
        begin, end = self.marks
        return begin.elapsed_time(end) / 1e3 if self.on_device else end - begin

    def _now(self) -> Any:
        if not self.on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def memory_peaks() -> tuple[int, int]:
    """Return peak bytes of the device since the last call, and of this process on the host since it began."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if not torch.cuda.is_available():
        return host, host
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak, host


def peak_gib() -> float:
    """Return the largest `memory_peaks` of a device over all ranks, in GiB.  A collective."""
    peak = torch.tensor(memory_peaks()[0] / _GIB)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return float(peak)


def gather(rank_step: RankStep, world: World) -> list[RankStep] | None:
    """Return every rank's figures on the first rank, None on the others.  A collective."""
    steps: list[Any] | None = [None] * world.size if world.is_main else None
    dist.gather_object(rank_step, steps)
    return steps


def rank_metrics(steps: Sequence[RankStep], seconds: float, tokens: int, peak_flops: float) -> dict[str, float]:
    """Return the metrics of a step that took ``seconds`` for ``tokens``, on devices of ``peak_flops`` FLOP/s.

    MFU is model FLOP (`ovr_megatron.model.flops`) over the peak FLOP of the devices in that time.
    """
    compute = [step.compute_seconds for step in steps]
    slowest = max(range(len(compute)), key=compute.__getitem__)
    flops = sum(step.flops for step in steps) / seconds / len(steps)
    return {
        "perf/tokens_per_second": tokens / seconds,
        "perf/tokens_per_second_per_gpu": tokens / seconds / len(steps),
        "perf/tflops_per_gpu": flops / 1e12,
        "perf/mfu": flops / peak_flops,
        "timing/step": seconds,
        "timing/data_wait": max(step.data_seconds for step in steps),
        "timing/rank_median": statistics.median(compute),
        "timing/rank_max": compute[slowest],
        "timing/rank_slowest": slowest,
        "memory/peak_gib": max(step.peak_bytes for step in steps) / _GIB,
        "memory/host_peak_gib": max(step.host_bytes for step in steps) / _GIB,
    }


def matrix_rate(dtype: torch.dtype) -> float:
    """Measure the FLOP per second of a matrix product in ``dtype`` on this device."""
    device, size, repeats = ("cuda", 8192, 20) if torch.cuda.is_available() else ("cpu", 512, 5)
    generator = torch.Generator(device)  # the global one decides the run's numbers and is left alone
    a = torch.randn(size, size, device=device, generator=generator).to(dtype)
    b = torch.randn(size, size, device=device, generator=generator).to(dtype)
    for _ in range(3):  # the first products load kernels and raise the clock
        a @ b
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        a @ b
    if device == "cuda":
        torch.cuda.synchronize()
    return 2.0 * size**3 * repeats / (time.perf_counter() - began)
