"""Run ``ovr replay``, which `ovr_megatron.cli.replay` describes."""

from ovr_megatron.cli.replay import main
from ovr_megatron.runtime.command import run_command

if __name__ == "__main__":
    run_command(main)
