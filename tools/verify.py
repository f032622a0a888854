"""Compare our model with Transformers' on the same weights: ``tools/verify.py --hf DIR [--layout tp=2]``.

Text, an image, three images of different sizes and a video go through both; the largest difference of the
logits and of every gradient is printed.  Exits with 1 past the bound.  For a layout of several processes it
starts them itself.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from ovr_megatron.launch import parse_layout
from ovr_megatron.runtime.command import run_command


def main() -> int:
    """Parse the command line and verify, here or in as many processes as the layout has ranks; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"), help="dtype of both models")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args()
    layout, replicas = arguments.layout
    processes = layout.ranks * replicas
    if processes > 1 and os.environ.get("WORLD_SIZE", "1") == "1":
        launcher = [sys.executable, "-m", "ovr_megatron.torchrun", "--standalone", f"--nproc-per-node={processes}"]
        return subprocess.run([*launcher, __file__, *sys.argv[1:]]).returncode

    # Imported here, so that --help does not wait for torch and Transformers.
    from ovr_megatron import verify

    arguments.layout = layout
    arguments.dtype = verify.DTYPE_NAMES[arguments.dtype]
    return verify.main(arguments)


if __name__ == "__main__":
    run_command(main)
