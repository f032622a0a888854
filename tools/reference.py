"""Run ``ovr reference``, which `ovr_megatron.cli.reference` describes."""

from ovr_megatron.cli.reference import main
from ovr_megatron.runtime.command import run_command

if __name__ == "__main__":
    run_command(main)
