"""Run ``ovr grade``, which `ovr_megatron.cli.grade` describes."""

from ovr_megatron.cli.grade import main
from ovr_megatron.runtime.command import run_command

if __name__ == "__main__":
    run_command(main)
