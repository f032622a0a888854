"""Write the policy of a checkpoint in Megatron-Core's torch_dist format, as Megatron-LM and Megatron-Bridge load it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ovr_megatron.runtime.terminal import printable


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and convert; exit 2 on bad input."""
    parser = argparse.ArgumentParser(prog="ovr convert to-megatron", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="CKPT", help="checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    text_help = "the language model alone, under the names of Megatron-LM's GPTModel (default: Megatron-Bridge's)"
    parser.add_argument("--text-only", action="store_true", help=text_help)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="dtype (default: as it is stored)")
    parser.add_argument("--force", action="store_true", help="replace what such a tool has written there")
    args = parser.parse_args(argv)

    # Imported here, so that --help does not wait for torch.
    from ovr_megatron.checkpoint.megatron import export_megatron

    try:
        export_megatron(args.checkpoint, args.out, args.text_only, args.dtype, args.force)
    except (ValueError, OSError) as error:
        parser.exit(2, printable(f"{parser.prog}: {error}\n"))
