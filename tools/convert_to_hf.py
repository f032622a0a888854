"""Run ``ovr convert to-hf``, which `ovr_megatron.cli.convert_to_hf` describes."""

from ovr_megatron.cli.convert_to_hf import main
from ovr_megatron.runtime.command import run_command

if __name__ == "__main__":
    run_command(main)
