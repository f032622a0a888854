"""Run ``ovr convert from-hf``, which `ovr_megatron.cli.convert_from_hf` describes."""

from ovr_megatron.cli.convert_from_hf import main
from ovr_megatron.runtime.command import run_command

if __name__ == "__main__":
    run_command(main)
