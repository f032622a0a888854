"""Recompute a saved PPO iteration in any layout and compare: ``ovr replay RUN ITERATION [parallel.tp=2 ...]``.

Log-probabilities, values, advantages, losses and gradient norms are shown beside those of the run, and the exit code is
1 where they differ by more than rounding.  On several ranks: ``torchrun --nproc-per-node N -m ovr_megatron replay ...``
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ovr_megatron.runtime.command import whole_number


def main(argv: Sequence[str] | None = None) -> int:
    """Replay one iteration and print the table; return 1 where the numbers differ."""
    parser = argparse.ArgumentParser(
        prog="ovr replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder of a PPO run")
    parser.add_argument("iteration", type=whole_number(0), help="from 0")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="on top of the run's configuration")
    args = parser.parse_args(argv)

    # Imported here, so that --help does not wait for torch and Megatron.
    from ovr_megatron import replay
    from ovr_megatron.runtime import distributed

    config = replay.load(args.run, args.overrides)
    world = distributed.start(config.parallel, config.run.seed, config.run.threads)
    values = replay.replay(config, args.run, args.iteration, world)
    bound = replay.BOUND[config.model.dtype]
    differs = any(not value.difference <= bound for value in values)  # so written, a NaN differs
    if world.is_main:
        print(replay.show(values))
        print(f"{'differs' if differs else 'the same'} (bound {bound:g} of the largest value)")
    distributed.finish()
    return 1 if differs else 0
