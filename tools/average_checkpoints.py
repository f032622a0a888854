"""Run ``ovr average``, which `ovr_megatron.cli.average` describes."""

from ovr_megatron.cli.average import main
from ovr_megatron.runtime.command import run_command

if __name__ == "__main__":
    run_command(main)
