"""Make a checkpoint (step 0) of one that Megatron-LM or Megatron-Bridge wrote: torch_dist, or mp_rank_* files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ovr_megatron.runtime.command import whole_number
from ovr_megatron.runtime.terminal import printable


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and convert; exit 2 on bad input."""
    parser = argparse.ArgumentParser(prog="ovr convert from-megatron", description=__doc__)
    megatron_help = "checkpoint folder, of which the newest iteration is read, or an iteration in it"
    parser.add_argument("--megatron", type=Path, required=True, metavar="DIR", help=megatron_help)
    hf_help = "Hugging Face folder of the same model: configuration, tokenizer and processor are taken from it"
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help=hf_help)
    parser.add_argument("--out", type=Path, required=True, metavar="CKPT", help="checkpoint folder to write")
    text_help = "the checkpoint is of the language model alone; take the vision tower of --hf"
    parser.add_argument("--text-only", action="store_true", help=text_help)
    parser.add_argument("--workers", type=whole_number(1), default=1, metavar="N", help="shards at a time (default: 1)")
    parser.add_argument("--force", action="store_true", help="replace what such a tool has written there")
    args = parser.parse_args(argv)

    # Imported here, so that --help does not wait for torch.
    from ovr_megatron.checkpoint.megatron import import_megatron

    try:
        import_megatron(args.megatron, args.hf, args.out, args.text_only, args.workers, args.force)
    except (ValueError, OSError) as error:
        parser.exit(2, printable(f"{parser.prog}: {error}\n"))
