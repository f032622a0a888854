"""Write the policy or the critic of a checkpoint as a Hugging Face folder that Transformers and vLLM load."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ovr_megatron.runtime.command import run_command, whole_number
from ovr_megatron.runtime.terminal import printable


def convert(checkpoint: Path, out: Path, critic: bool, dtype: str | None, workers: int, force: bool) -> None:
    """Write the folder ``out``, which appears when it is complete; print which parts of the checkpoint are left out."""
    import torch

    from ovr_megatron.checkpoint.hf_assets import write_generation_config
    from ovr_megatron.checkpoint.manifest import CheckpointError, check
    from ovr_megatron.data.hf_assets import load_assets
    from ovr_megatron.model.shape import ModelShape
    from ovr_megatron.weights.folder import WeightFolder, copy_hf_assets
    from ovr_megatron.weights.transfer import VALUE_HEAD, check_finite, check_weights, copy_weights, staged

    part = "critic" if critic else "policy"
    manifest = check(checkpoint, under=part)
    if not (checkpoint / part).is_dir():
        parts = ", ".join(sorted({name.split("/")[0] for name in manifest.files}))
        raise CheckpointError(f"{checkpoint} has no {part}, only {parts}; use another checkpoint")
    shape = ModelShape.from_hf(checkpoint / part)
    assets = load_assets(checkpoint / part, shape)
    export_dtype = getattr(torch, dtype) if dtype else None
    with WeightFolder(checkpoint / part) as folder:
        # All checks come before anything is written.
        check_weights(folder, shape, critic)
        check_finite(folder)
        with staged(out, [checkpoint], force) as partial:
            copy_hf_assets(checkpoint / part, partial, export_dtype)
            if manifest.step:  # step 0 is the base model itself
                write_generation_config(partial, assets.tokenizer.get_vocab())
            copy_weights(folder, partial, export_dtype, leave_out=[VALUE_HEAD], workers=workers)
    print(f"{out}: {part} of step {manifest.step}")
    left_out = sorted({name.split("/")[0] for name in manifest.files} - {part})
    if critic:
        left_out.insert(0, f"{VALUE_HEAD} (a Hugging Face model has no place for it)")
        if not shape.tied:
            print("a critic has no lm_head.weight: load it with AutoModel, it cannot generate")
    print(printable(f"left out: {', '.join(left_out) or 'nothing'}"))


def verify(out: Path, hf: Path, critic: bool, workers: int) -> bool:
    """Compare with the folder ``hf``, tensors bit by bit, other files byte by byte; print and return the result.

    Returns:
        Whether both folders are equal.
    """
    from ovr_megatron.weights.diagnosis import HEAD
    from ovr_megatron.weights.transfer import VALUE_HEAD, differences

    problems = differences(out, hf, ignore=[HEAD, VALUE_HEAD] if critic else [], workers=workers)
    for problem in problems[:20]:
        print(printable(f"differs: {problem}"))
    print(f"{len(problems)} differences from {hf}" if problems else f"equal to {hf}, bit by bit")
    return not problems


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and convert; exit 1 if ``--verify`` finds a difference, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="convert_to_hf.py", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="CKPT", help="checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="Hugging Face folder to write")
    parser.add_argument("--verify", type=Path, metavar="HF_DIR", help="compare the result with this folder, bit by bit")
    parser.add_argument("--critic", action="store_true", help="export the critic, without its value head")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="dtype (default: as it is stored)")
    parser.add_argument("--workers", type=whole_number(1), default=1, metavar="N", help="shards at a time (default: 1)")
    parser.add_argument("--force", action="store_true", help="replace what such a tool has written there")
    args = parser.parse_args(argv)
    try:
        convert(args.checkpoint, args.out, args.critic, args.dtype, args.workers, args.force)
        equal = args.verify is None or verify(args.out, args.verify, args.critic, args.workers)
    except (ValueError, OSError) as error:
        parser.exit(2, printable(f"{parser.prog}: {error}\n"))
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    run_command(main)
