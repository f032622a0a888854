"""Measure the project beside named rivals on this machine, in one run: ``tools/bench.py model [--json FILE]``.

model: forward and backward of our model beside Transformers', at layer shapes of the tiny, the 3B and the 7B model.
step: a cold-start pack of 65,536 tokens at the 3B and the 7B shape on a GPU, beside Transformers and beside the plan.
vision: the tower on two ranks, cut over them or with the images dealt out.
prepare: data preparation beside a plain datasets.map.
head: log-probabilities over a large vocabulary in chunks, beside the whole logits.
packing: an epoch of natural lengths into packs of 65,536 tokens, beside NeMo's packing where `nemo` can be imported.
rl: one iteration's phases, generation beside plain vLLM, the weights' way into the engine beside a copy, verdicts.
save: how long a checkpoint holds two ranks up, beside all files by the first rank.
"""

import argparse
import json
from pathlib import Path

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


def main() -> None:
    """Run one benchmark, print its table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("model", "step", "head", "vision", "packing", "prepare", "save", "rl"))
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    parser.add_argument("--rounds", type=int, default=3, help="turns that rivals take; the best counts")
    parser.add_argument("--shapes", nargs="+", choices=tuple(bench.SHAPES), default=list(bench.SHAPES))
    parser.add_argument("--fp8", choices=("delayed", "current", "block"), default="current", help="scaling (step)")
    parser.add_argument("--only", default="", metavar="WORD", help="rows with this word in their name (model)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a pack (model)")
    parser.add_argument("--mean", type=int, default=64, help="mean length of a document (model)")
    parser.add_argument("--samples", type=int, default=2_000_000, help="lengths of the whole epoch (packing)")
    parser.add_argument("--rival-samples", type=int, default=10_000, help="lengths beside the rival (packing)")
    parser.add_argument("--rows", type=int, default=200_000, help="rows to prepare (prepare)")
    parser.add_argument("--workers", type=int, default=1, help="processes that judge rows (prepare)")
    arguments = parser.parse_args()
    if arguments.what == "model":
        print(bench.HEADER)
        rows = []
        cases = bench.cases(arguments.shapes, arguments.tokens, arguments.mean)
        chosen = [case for case in cases if arguments.only in case[0]]
        for row in bench.run_table(chosen, arguments.rounds):
            print(bench.line(row), flush=True)
            rows.append(row)
        if any("mfu" in row for row in rows):
            print(bench.FLOP_FORMULA)
    elif arguments.what == "step":
        on_gpu = torch.cuda.is_available()
        shapes, size = (("3B", "7B"), (65536, bench_step.MEAN_LENGTH)) if on_gpu else (("tiny",), (1024, 64))
        print(bench_step.HEADER)
        rows = []
        for row in bench_step.rows(shapes, *size, arguments.rounds, arguments.fp8):
            print(bench_step.show(row), flush=True)
            rows.append(row)
        print(bench.FLOP_FORMULA)
    elif arguments.what == "vision":
        rows = bench_vision.rows(arguments.rounds)
        print(bench_vision.show(rows))
    elif arguments.what == "packing":
        rows = bench_packing.rows(arguments.samples, arguments.rival_samples, arguments.rounds)
        print(bench_packing.show(rows))
    elif arguments.what == "prepare":
        rows = bench_prepare.rows(arguments.rows, arguments.workers, arguments.rounds)
        print(bench_prepare.show(rows))
    elif arguments.what == "save":
        rows = bench_save.rows(arguments.rounds)
        print(bench_save.show(rows))
    elif arguments.what == "rl":
        rows = bench_rl.rows(arguments.rounds)
        print(bench_rl.show(rows))
    else:
        rows = bench_head.rows(rounds=arguments.rounds)
        print(bench_head.show(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
