"""Compare the problems that two checkpoints solve: ``ovr support BEFORE AFTER [--samples K] [--out FILE]``.

A problem is solved if one of the first K samples is right (pass@K).  The table has how many problems both checkpoints
solve, the later one alone (after), the earlier one alone (before) and neither; retention is both / (both + before),
discovery after / (both + after).  With a large K they tell whether training widened what a model can do, or made it
surer of what it could do.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ovr_megatron.runtime.command import whole_number
from ovr_megatron.runtime.files import write_json
from ovr_megatron.runtime.terminal import printable


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, compare, print the table and write the ids."""
    parser = argparse.ArgumentParser(
        prog="ovr support", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, metavar="BEFORE", help="SET.responses.jsonl of the earlier checkpoint")
    parser.add_argument("after", type=Path, metavar="AFTER", help="the same of the later one")
    parser.add_argument(
        "--samples", type=whole_number(0), default=0, metavar="K", help="first samples of each problem (default: all)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON with the ids of the problems of each kind")
    args = parser.parse_args(argv)
    # Here, so that --help does not wait for the graders' libraries.
    from ovr_megatron.evaluation.support import compare, format_table

    supports = compare(args.before, args.after, args.samples)
    print(printable(format_table(supports)), flush=True)
    if args.out:
        sources = {source: asdict(support) for source, support in supports.items() if source}
        write_json(args.out, {"all": asdict(supports[""]), "sources": sources})
        print(args.out, flush=True)
