"""Run the benchmarks of `ovr bench` by name: each prints its table and returns the rows."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable

import torch

from benchmarks import adapters, head, model, packing, peers, prepare, rl, save, step, tail, vision
from benchmarks.shapes import LAYER_SHAPES, PEER_SHAPES
from benchmarks.subprocess_bench import BenchRow

Rows = list[BenchRow]
Benchmark = Callable[[argparse.Namespace], Rows]


def _run_model(arguments: argparse.Namespace) -> Rows:
    """Measure the model beside Transformers', and print each row as soon as it is measured."""
    cases = model.make_cases(arguments.shapes or list(LAYER_SHAPES), arguments.tokens, arguments.mean, arguments.family)
    selected = [case for case in cases if arguments.only in case[0]]
    print(model.HEADER)
    rows = _print_each(model.run_table(selected, arguments.rounds), model.format_row)
    if any("mfu" in row for row in rows):
        print(model.FLOP_FORMULA)
    return rows


def _run_step(arguments: argparse.Namespace) -> Rows:
    """Measure a cold-start pack at the published shapes, and print each row as soon as it is measured."""
    shapes = arguments.shapes or (["3B", "7B"] if torch.cuda.is_available() else ["tiny"])
    print(step.HEADER)
    measurements = step.run(shapes, arguments.rounds, arguments.fp8, arguments.only, arguments.trace)
    rows = _print_each(measurements, step.format_row)
    print(model.FLOP_FORMULA)
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


def _run_vision(arguments: argparse.Namespace) -> Rows:
    shapes = arguments.shapes or (["7B"] if torch.cuda.is_available() else ["tiny"])
    rows: Rows = []
    for shape in shapes:
        rows += vision.run(arguments.rounds, shape, arguments.family)
    return rows


def _run_packing(arguments: argparse.Namespace) -> Rows:
    return packing.run(arguments.samples, arguments.rival_samples, arguments.rounds)


def _run_prepare(arguments: argparse.Namespace) -> Rows:
    return prepare.run(arguments.rows, arguments.workers, arguments.rounds)


def _run_tail(arguments: argparse.Namespace) -> Rows:
    return tail.run(
        arguments.iterations,
        arguments.prompts,
        arguments.oversample,
        arguments.between,
        arguments.staleness,
        arguments.step_ms,
    )


def _run_adapters(arguments: argparse.Namespace) -> Rows:
    return adapters.run(arguments.shapes or list(PEER_SHAPES), arguments.rounds)


def _run_peers(arguments: argparse.Namespace) -> Rows:
    """Measure ours beside TRL, and print each row as soon as it is measured."""
    shapes = arguments.shapes or list(PEER_SHAPES)
    cases = peers.make_cases(shapes, arguments.only)
    folder = arguments.peer.resolve()
    print(peers.find_trl(folder))
    print(peers.HEADER)
    return _print_each(peers.run(cases, arguments.rounds, folder), peers.format_row)


BENCHMARKS: dict[str, Benchmark] = {
    "model": _run_model,
    "step": _run_step,
    "vision": _print_at_end(_run_vision, vision.format_table),
    "head": _print_at_end(lambda arguments: head.run(arguments.rounds), head.format_table),
    "rl": _print_at_end(lambda arguments: rl.run(arguments.rounds, arguments.only), rl.format_table),
    "packing": _print_at_end(_run_packing, packing.format_table),
    "prepare": _print_at_end(_run_prepare, prepare.format_table),
    "save": _print_at_end(lambda arguments: save.run(arguments.rounds), save.format_table),
    "tail": _print_at_end(_run_tail, tail.format_table),
    "adapters": _print_at_end(_run_adapters, adapters.format_table),
    "peers": _run_peers,
}


def gpu_name() -> str:
    """Return the name of the GPU."""
    return torch.cuda.get_device_properties(0).name if torch.cuda.is_available() else "no GPU"
