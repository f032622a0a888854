"""The benchmarks of `tools/bench.py` by name: each prints its table and returns the rows."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

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

Rows = list[dict[str, Any]]


def model(arguments: argparse.Namespace) -> Rows:
    """Row by row, as they are measured."""
    cases = bench.cases(arguments.shapes or list(LAYER_SHAPES), arguments.tokens, arguments.mean)
    chosen = [case for case in cases if arguments.only in case[0]]
    print(bench.HEADER)
    found = []
    for row in bench.run_table(chosen, arguments.rounds):
        print(bench.line(row), flush=True)
        found.append(row)
    if any("mfu" in row for row in found):
        print(bench.FLOP_FORMULA)
    return found


def step(arguments: argparse.Namespace) -> Rows:
    """Row by row, too."""
    shapes = arguments.shapes or (["3B", "7B"] if torch.cuda.is_available() else ["tiny"])
    print(bench_step.HEADER)
    found = []
    for row in bench_step.rows(shapes, arguments.rounds, arguments.fp8, arguments.only, arguments.trace):
        print(bench_step.show(row), flush=True)
        found.append(row)
    print(bench.FLOP_FORMULA)
    return found


def whole(show: Callable[[Rows], str], rows: Callable[[argparse.Namespace], Rows]) -> Callable[..., Rows]:
    """A benchmark whose table is printed when all of it is there."""

    def measure(arguments: argparse.Namespace) -> Rows:
        found = rows(arguments)
        print(show(found), flush=True)
        return found

    return measure


BENCHMARKS: dict[str, Callable[[argparse.Namespace], Rows]] = {
    "model": model,
    "step": step,
    "vision": whole(bench_vision.show, lambda given: bench_vision.rows(given.rounds)),
    "head": whole(bench_head.show, lambda given: bench_head.rows(given.rounds)),
    "rl": whole(bench_rl.show, lambda given: bench_rl.rows(given.rounds, given.only)),
    "packing": whole(
        bench_packing.show, lambda given: bench_packing.rows(given.samples, given.rival_samples, given.rounds)
    ),
    "prepare": whole(bench_prepare.show, lambda given: bench_prepare.rows(given.rows, given.workers, given.rounds)),
    "save": whole(bench_save.show, lambda given: bench_save.rows(given.rounds)),
}


def card() -> str:
    """Return the name of the GPU."""
    return torch.cuda.get_device_properties(0).name if torch.cuda.is_available() else "no GPU"
