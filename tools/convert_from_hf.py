"""Make a checkpoint (step 0) of a Hugging Face folder: every tensor checked, every other file kept."""

from __future__ import annotations

import argparse
from pathlib import Path

from ovr_megatron.runtime.command import run_command, whole_number
from ovr_megatron.runtime.terminal import printable


def convert(hf: Path, out: Path, workers: int, force: bool, yarn: float | None) -> None:
    """Write ``out/policy``, stretched ``yarn`` times, and the manifest; ``out`` appears when it is complete."""
    from ovr_megatron.checkpoint.manifest import write_manifest
    from ovr_megatron.data.hf_assets import check_assets, complete_folder
    from ovr_megatron.data.hf_files import list_other_files
    from ovr_megatron.families.stretch import stretch_positions
    from ovr_megatron.weights.folder import WeightFolder, copy_hf_assets
    from ovr_megatron.weights.transfer import check_finite, check_weights, copy_weights, staged

    shape = check_assets(hf)
    with WeightFolder(hf) as folder:
        # All checks come before anything is written.
        check_weights(folder, shape)
        check_finite(folder)
        with staged(out, [hf], force) as partial:
            copy_hf_assets(complete_folder(hf), partial / "policy")
            if yarn is not None:
                shape = stretch_positions(partial / "policy", yarn)
            copy_weights(folder, partial / "policy", workers=workers)
            manifest = write_manifest(partial, step=0, extra={"converted_from": str(hf.resolve())})
    total_bytes = sum(file.bytes for file in manifest.files.values())
    print(f"{out}: checkpoint of step 0, {total_bytes:,} bytes")
    if other_files := list_other_files(hf):
        print(f"not copied, as they are no part of the model: {', '.join(other_files)}")
    if yarn is not None:
        print(f"YaRN: {shape.max_positions:,} positions in config.json, {yarn:g} times {shape.trained_positions:,}")


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and convert; exit 2 on bad input."""
    parser = argparse.ArgumentParser(prog="convert_from_hf.py", description=__doc__)
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="Hugging Face folder (safetensors)")
    parser.add_argument("--out", type=Path, required=True, metavar="CKPT", help="checkpoint folder to write")
    parser.add_argument("--workers", type=whole_number(1), default=1, metavar="N", help="shards at a time (default: 1)")
    yarn_help = "stretch the positions so many times with YaRN; trainer, vLLM and export read it from config.json"
    parser.add_argument("--yarn", type=float, metavar="FACTOR", help=yarn_help)
    parser.add_argument("--force", action="store_true", help="replace what such a tool has written there")
    args = parser.parse_args(argv)
    try:
        convert(args.hf, args.out, args.workers, args.force, args.yarn)
    except (ValueError, OSError) as error:
        parser.exit(2, printable(f"{parser.prog}: {error}\n"))


if __name__ == "__main__":
    run_command(main)
