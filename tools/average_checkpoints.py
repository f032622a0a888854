"""Average checkpoints uniformly: a checkpoint of checkpoints' policies, a Hugging Face folder of such folders."""

from __future__ import annotations

import argparse
from pathlib import Path

from ovr_megatron.runtime.command import run_command
from ovr_megatron.runtime.terminal import printable


def combine(directories: list[Path], out: Path, force: bool) -> None:
    """Write the mean to ``out``: a checkpoint if all ``directories`` are checkpoints, else a Hugging Face folder."""
    from ovr_megatron.checkpoint.manifest import MANIFEST, check, write_manifest
    from ovr_megatron.weights.average import average
    from ovr_megatron.weights.transfer import staged

    checkpoints = [directory for directory in directories if (directory / MANIFEST).exists()]
    manifests = [check(directory, under="policy") for directory in checkpoints]
    if len(checkpoints) < len(directories):
        average(directories, out, force)
        print(f"{out}: Hugging Face folder, mean of {len(directories)} models")
        return
    step = max(manifest.step for manifest in manifests)
    sources = [str(directory.resolve()) for directory in directories]
    with staged(out, directories, force) as partial:
        average(directories, partial / "policy")
        write_manifest(partial, step, extra={"average_of": sources})
    print(f"{out}: checkpoint, mean of the policies of {len(directories)} checkpoints")


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and average; exit 2 on bad input."""
    parser = argparse.ArgumentParser(prog="average_checkpoints.py", description=__doc__)
    parser.add_argument("directories", type=Path, nargs="+", metavar="DIR", help="checkpoint or Hugging Face folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace what such a tool has written there")
    args = parser.parse_args(argv)
    try:
        combine(args.directories, args.out, args.force)
    except (ValueError, OSError) as error:
        parser.exit(2, printable(f"{parser.prog}: {error}\n"))


if __name__ == "__main__":
    run_command(main)
