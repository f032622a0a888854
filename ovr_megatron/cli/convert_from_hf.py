"""Make a checkpoint (step 0) of a Hugging Face folder: every tensor checked, every other file kept."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ovr_megatron.runtime.command import whole_number
from ovr_megatron.runtime.terminal import printable


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and convert; exit 2 on bad input."""
    parser = argparse.ArgumentParser(prog="ovr convert from-hf", description=__doc__)
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="Hugging Face folder (safetensors)")
    parser.add_argument("--out", type=Path, required=True, metavar="CKPT", help="checkpoint folder to write")
    parser.add_argument("--workers", type=whole_number(1), default=1, metavar="N", help="shards at a time (default: 1)")
    yarn_help = "stretch the positions so many times with YaRN; trainer, vLLM and export read it from config.json"
    parser.add_argument("--yarn", type=float, metavar="FACTOR", help=yarn_help)
    layers_help = "layers of the language model to take, as 0,2,4: a smaller model, which has to learn again"
    parser.add_argument("--layers", type=_layer_numbers, metavar="N,N,...", help=layers_help)
    parser.add_argument("--force", action="store_true", help="replace what such a tool has written there")
    args = parser.parse_args(argv)

    # Imported here, so that --help does not wait for torch.
    from ovr_megatron.checkpoint.conversion import import_hf

    try:
        import_hf(args.hf, args.out, args.workers, args.force, args.yarn, args.layers)
    except (ValueError, OSError) as error:
        parser.exit(2, printable(f"{parser.prog}: {error}\n"))


def _layer_numbers(text: str) -> list[int]:
    """Read numbers between commas."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        message = f"{text!r} is no list of layers; write numbers between commas, as 0,2,4"
        raise argparse.ArgumentTypeError(message) from None
