"""Average checkpoints uniformly: a checkpoint of checkpoints' policies, a Hugging Face folder of such folders."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ovr_megatron.runtime.terminal import printable


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and average; exit 2 on bad input."""
    parser = argparse.ArgumentParser(prog="ovr average", description=__doc__)
    parser.add_argument("directories", type=Path, nargs="+", metavar="DIR", help="checkpoint or Hugging Face folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace what such a tool has written there")
    args = parser.parse_args(argv)

    # Imported here, so that --help does not wait for torch.
    from ovr_megatron.checkpoint.conversion import average_checkpoints

    try:
        average_checkpoints(args.directories, args.out, args.force)
    except (ValueError, OSError) as error:
        parser.exit(2, printable(f"{parser.prog}: {error}\n"))
