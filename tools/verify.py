"""Run ``ovr verify``, which `ovr_megatron.cli.verify` describes."""

from ovr_megatron.cli.verify import main
from ovr_megatron.runtime.command import run_command

if __name__ == "__main__":
    run_command(main)
