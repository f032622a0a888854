"""Recompute a saved PPO iteration in any layout and compare: ``tools/replay.py RUN ITERATION [parallel.tp=2 ...]``.

Log-probabilities, values, advantages, losses and gradient norms are shown beside those of the run, and the exit code is
1 where they differ by more than rounding.  For several ranks: ``torchrun --nproc-per-node N tools/replay.py ...``.
"""

import argparse
from pathlib import Path

from ovr_megatron.runtime.command import run_command, whole_number


def main() -> int:
    """Replay one iteration and print the table; return 1 where the numbers differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of a PPO run")
    parser.add_argument("iteration", type=whole_number(0), help="from 0")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="on top of the run's configuration")
    args = parser.parse_args()

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


if __name__ == "__main__":
    run_command(main)
