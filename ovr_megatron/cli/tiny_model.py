"""Write a small random model folder: ``ovr tiny-model --out DIR [--untied] [--seed N]``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from ovr_megatron.families import default_family, families
from ovr_megatron.families.tiny import TinySizes
from ovr_megatron.runtime.command import number, whole_number


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and write the folder."""
    parser = argparse.ArgumentParser(
        prog="ovr tiny-model", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--tied", action=argparse.BooleanOptionalAction, default=True, help="tie output and embedding")
    parser.add_argument("--untied", dest="tied", action="store_false", help="the same as --no-tied")
    names = [family.name for family in families()]
    parser.add_argument("--family", choices=names, default=default_family().name, help="family of the model")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="seed of the weights")
    parser.add_argument("--std", type=number(least=0), default=0.04, help="standard deviation of the matrices")
    parser.add_argument("--perturb", action="store_true", help="move norms and biases off 1 and 0")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the weights")
    parser.add_argument("--corpus", type=Path, help="text file to train the tokenizer on, one text a line")
    for size in fields(TinySizes):
        parser.add_argument(f"--{size.name.replace('_', '-')}", type=whole_number(1), default=size.default, help="size")
    args = parser.parse_args(argv)
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        parser.exit(2, f"{parser.prog}: {args.out} exists and is not empty; remove it or choose another folder\n")

    # Imported here, so that --help does not wait for torch.
    import torch

    from ovr_megatron.model.tiny import make_tiny_model
    from ovr_megatron.weights.transfer import staged

    try:
        # The folder appears when it is complete; an interruption leaves none.
        with staged(args.out, []) as partial:
            sizes = TinySizes(**{size.name: getattr(args, size.name) for size in fields(TinySizes)})
            corpus = args.corpus.read_text(encoding="utf-8").splitlines(keepends=True) if args.corpus else None
            make_tiny_model(
                partial,
                tied=args.tied,
                seed=args.seed,
                sizes=sizes,
                corpus=corpus,
                perturb=args.perturb,
                std=args.std,
                dtype=getattr(torch, args.dtype),
                family=args.family,
            )
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(args.out)
