"""Run ``ovr preflight``, which `ovr_megatron.cli.preflight` describes."""

from ovr_megatron.cli.preflight import main
from ovr_megatron.runtime.command import run_command

if __name__ == "__main__":
    run_command(main)
