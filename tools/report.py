"""Run ``ovr report``, which `ovr_megatron.cli.report` describes."""

from ovr_megatron.cli.report import main
from ovr_megatron.runtime.command import run_command

if __name__ == "__main__":
    run_command(main)
