"""Compare our model with Transformers' on the same weights: ``ovr verify --hf DIR [--layout tp=2]``.

Text, an image, three images of different sizes and a video go through both; the largest difference of the
logits and of every gradient is printed.  Exits with 1 past the bound.  For a layout of several processes it
starts them itself.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ovr_megatron.config.layout_text import parse_layout
from ovr_megatron.launch import parse_options


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and verify, here or in as many processes as the layout has ranks; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="ovr verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder, the reference")
    parser.add_argument("--checkpoint", type=Path, help="take our weights from this checkpoint instead")
    parser.add_argument(
        "--layout",
        type=parse_layout,
        default="",
        help="sizes tp, pp, vpp, cp, dp, and 1 for sp (sequence parallel) or zero (distributed optimizer): tp=2,sp=1",
    )
    parser.add_argument("--packed", action="store_true", help="several documents of odd lengths in a pack")
    parser.add_argument("--critic", action="store_true", help="compare a value network instead of a policy")
    dtypes = ("float32", "bfloat16")
    parser.add_argument("--dtype", type=full_name, default="float32", choices=dtypes, help="dtype of both models")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    words = sys.argv[1:] if argv is None else argv
    arguments = parse_options(parser, words)
    layout, replicas = arguments.layout
    processes = layout.ranks * replicas
    # torchrun sets WORLD_SIZE: a process that has it is a rank already and starts no others.
    if processes > 1 and os.environ.get("WORLD_SIZE", "1") == "1":
        launcher = [sys.executable, "-m", "ovr_megatron.torchrun", "--standalone", f"--nproc-per-node={processes}"]
        return subprocess.run([*launcher, "-m", "ovr_megatron", "verify", *words]).returncode

    # Imported here, so that --help does not wait for torch and Transformers.
    from ovr_megatron import verify

    arguments.layout = layout
    return verify.main(arguments)


def full_name(dtype: str) -> str:
    """Return the name of a dtype for its short form, ``fp32`` or ``bf16``; another text stays as it is."""
    return {"fp32": "float32", "bf16": "bfloat16"}.get(dtype, dtype)
