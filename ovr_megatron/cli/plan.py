"""What a recipe costs before it is submitted: ``ovr plan RECIPE [key=value ...]``; no GPU, no process group.

Parameters, gradients and optimizer state of a rank (exact), activations and the other memory of each phase
(estimated), FLOP, hours and GPU-hours, the checkpoint's size, and every layout (parallel sizes, recomputation,
``offload``, ``rollout.tp``; settings of the command line stay): those that fit, fastest first, the command that runs
the fastest, and why others cannot be.  ``model.path`` is a folder, or the name of a published model (listed below).
With ``--simulate`` also iterations of reinforcement learning in each way of generating: seconds, idle shares, gain.
Exits with 1 if the recipe does not fit, with 2 if it cannot work.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from ovr_megatron.families.presets import presets
from ovr_megatron.launch import compose
from ovr_megatron.plan.hardware import GPUS, find_gpu, gpu_in_name
from ovr_megatron.runtime.command import number, whole_number

T = TypeVar("T")
_FIGURES = (".svg", ".png", ".pdf")
_LISTED = "values to compare, with commas between them"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and print the plan; return the exit code, 1 if the recipe does not fit."""
    parser = _parser()
    # Settings may stand on both sides of an option, which `parse_args` does not take.
    arguments = parser.parse_intermixed_args(argv)
    for option in ("lengths", "oversample", "staleness", "ranks", "figure"):
        if getattr(arguments, option) and not arguments.simulate:
            parser.error(f"--{option} is an option of a simulation; add --simulate")
    if arguments.figure and arguments.figure.suffix not in _FIGURES:
        parser.error(f"--figure {arguments.figure}: the name must end in {', '.join(_FIGURES)}")
    name = Path(arguments.recipe).stem
    gpu = arguments.gpu or gpu_in_name(name)
    find_gpu(gpu)  # refuses an unknown kind before anything is read
    config = compose(arguments.recipe, arguments.overrides)

    # Imported here, so that a command line is checked before torch and Megatron are loaded.
    from ovr_megatron.plan.report import Options, plan, processes
    from ovr_megatron.plan.simulation import SimulationOptions
    from ovr_megatron.plan.text import show

    # The name of a recipe may end in its number of processes, as in ..._64gpu.
    world = arguments.world or processes(name, config.parallel)
    options = Options(world, gpu, arguments.mfu, not arguments.no_search, arguments.recipe, tuple(arguments.overrides))
    if arguments.simulate:
        simulation = SimulationOptions(arguments.lengths, arguments.oversample, arguments.staleness, arguments.ranks)
        options = replace(options, simulation=simulation)
    summary = plan(config, options)
    if arguments.figure and summary["simulation"]:
        from ovr_megatron.analysis.timelines import write_simulation

        write_simulation(summary["simulation"], arguments.figure)
    print(json.dumps(summary) if arguments.json else show(summary))
    return 0 if summary["fits"] else 1


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="ovr plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"published models: {', '.join(presets())}",
    )
    parser.add_argument("recipe", help="name under ovr_megatron/recipes/, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as on the stage's command line")
    parser.add_argument("--world", type=whole_number(1), help="processes (default: the 64 of a recipe named ..._64gpu)")
    parser.add_argument(
        "--gpu",
        metavar="KIND",
        help=f"{', '.join(GPUS)}, or the memory in GiB (default: that of a recipe named ..._24gb, else h100, 80 GB)",
    )
    parser.add_argument(
        "--mfu", type=number(above=0, most=1), default=0.4, help="model FLOP utilisation to reckon with (default: 0.4)"
    )
    parser.add_argument("--no-search", action="store_true", help="the recipe's own layout only")
    parser.add_argument("--json", action="store_true", help="print everything as JSON: bytes, seconds, FLOP")
    _add_simulation(parser)
    return parser


def _add_simulation(parser: argparse.ArgumentParser) -> None:
    """Add the options of a simulation."""
    group = parser.add_argument_group("simulated iterations")
    group.add_argument("--simulate", action="store_true", help="simulate generation, grading and training")
    group.add_argument(
        "--lengths",
        default="",
        metavar="FILE|RUN|MEAN:LONGEST",
        help="tokens of responses: a file (one a line, or JSON), a run's rollouts, or log-normal (default: log-normal "
        "by the recipe's mean and limit)",
    )
    group.add_argument("--oversample", type=_listed(number(above=0)), default=(), metavar="SHARE,...", help=_LISTED)
    group.add_argument(
        "--staleness",
        type=_listed(whole_number(1)),
        default=(),
        metavar="UPDATES,...",
        help=f"{_LISTED} (default: 1,2)",
    )
    group.add_argument(
        "--ranks",
        type=_listed(whole_number(1)),
        default=(),
        metavar="RANKS,...",
        help="ranks that generate only (default: a quarter and a half of them)",
    )
    group.add_argument("--figure", type=Path, metavar="FILE", help="draw the iterations: .svg, .png or .pdf")


def _listed(read: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """Return the type of an option that is a list of what ``read`` reads, with commas."""

    def read_all(text: str) -> tuple[T, ...]:
        return tuple(read(part) for part in text.split(","))

    return read_all
