"""Run ``ovr check-data``, which `ovr_megatron.cli.check_data` describes."""

from ovr_megatron.cli.check_data import main
from ovr_megatron.runtime.command import run_command

if __name__ == "__main__":
    run_command(main)
