"""Write the policy or the critic of a checkpoint as a Hugging Face folder that Transformers and vLLM load."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ovr_megatron.runtime.command import whole_number
from ovr_megatron.runtime.terminal import printable


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and convert; exit 1 if ``--verify`` finds a difference, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="ovr convert to-hf", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="CKPT", help="checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="Hugging Face folder to write")
    parser.add_argument("--verify", type=Path, metavar="HF_DIR", help="compare the result with this folder, bit by bit")
    parser.add_argument("--critic", action="store_true", help="export the critic, without its value head")
    parser.add_argument("--merge", action="store_true", help="add the checkpoint's adapters (LoRA) to their model")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="dtype (default: as it is stored)")
    parser.add_argument("--workers", type=whole_number(1), default=1, metavar="N", help="shards at a time (default: 1)")
    parser.add_argument("--force", action="store_true", help="replace what such a tool has written there")
    args = parser.parse_args(argv)

    # Imported here, so that --help does not wait for torch.
    from ovr_megatron.checkpoint.conversion import compare_export, export_hf

    try:
        export_hf(args.checkpoint, args.out, args.critic, args.dtype, args.workers, args.force, args.merge)
        equal = args.verify is None or compare_export(args.out, args.verify, args.critic, args.workers)
    except (ValueError, OSError) as error:
        parser.exit(2, printable(f"{parser.prog}: {error}\n"))
    sys.exit(0 if equal else 1)
