"""Run the benchmarks of `tools/bench.py` by name: each prints its table and returns the rows."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable

import torch

from ovr_megatron.analysis import (
    bench,
    bench_head,
    bench_packing,
    bench_prepare,
    bench_rl,
    bench_save,
    bench_step,
    bench_vision,
)
from ovr_megatron.analysis.bench_shapes import LAYER_SHAPES
from ovr_megatron.analysis.subprocess_bench import BenchRow

Rows = list[BenchRow]
Benchmark = Callable[[argparse.Namespace], Rows]


def _run_model(arguments: argparse.Namespace) -> Rows:
    """Measure the model beside Transformers', and print each row as soon as it is measured."""
    cases = bench.make_cases(arguments.shapes or list(LAYER_SHAPES), arguments.tokens, arguments.mean)
    selected = [case for case in cases if arguments.only in case[0]]
    print(bench.HEADER)
    rows = _print_each(bench.run_table(selected, arguments.rounds), bench.format_row)
    if any("mfu" in row for row in rows):
        print(bench.FLOP_FORMULA)
    return rows


def _run_step(arguments: argparse.Namespace) -> Rows:
    """Measure a cold-start pack at the published shapes, and print each row as soon as it is measured."""
    shapes = arguments.shapes or (["3B", "7B"] if torch.cuda.is_available() else ["tiny"])
    print(bench_step.HEADER)
    measurements = bench_step.run(shapes, arguments.rounds, arguments.fp8, arguments.only, arguments.trace)
    rows = _print_each(measurements, bench_step.format_row)
    print(bench.FLOP_FORMULA)
    return rows


def _print_each(measurements: Iterable[BenchRow], format_row: Callable[[BenchRow], str]) -> Rows:
    rows = []
    for row in measurements:
        print(format_row(row), flush=True)
        rows.append(row)
    return rows


def _print_at_end(run: Callable[[argparse.Namespace], Rows], format_table: Callable[[Rows], str]) -> Benchmark:
    """Return a benchmark that prints its table after the last measurement: ratios need all rows."""

    def run_and_print(arguments: argparse.Namespace) -> Rows:
        rows = run(arguments)
        print(format_table(rows), flush=True)
        return rows

    return run_and_print


def _run_packing(arguments: argparse.Namespace) -> Rows:
    return bench_packing.run(arguments.samples, arguments.rival_samples, arguments.rounds)


def _run_prepare(arguments: argparse.Namespace) -> Rows:
    return bench_prepare.run(arguments.rows, arguments.workers, arguments.rounds)


BENCHMARKS: dict[str, Benchmark] = {
    "model": _run_model,
    "step": _run_step,
    "vision": _print_at_end(lambda arguments: bench_vision.run(arguments.rounds), bench_vision.format_table),
    "head": _print_at_end(lambda arguments: bench_head.run(arguments.rounds), bench_head.format_table),
    "rl": _print_at_end(lambda arguments: bench_rl.run(arguments.rounds, arguments.only), bench_rl.format_table),
    "packing": _print_at_end(_run_packing, bench_packing.format_table),
    "prepare": _print_at_end(_run_prepare, bench_prepare.format_table),
    "save": _print_at_end(lambda arguments: bench_save.run(arguments.rounds), bench_save.format_table),
}


def gpu_name() -> str:
    """Return the name of the GPU."""
    return torch.cuda.get_device_properties(0).name if torch.cuda.is_available() else "no GPU"
