"""Run ``ovr settings``, which `ovr_megatron.cli.settings` describes."""

from ovr_megatron.cli.settings import main
from ovr_megatron.runtime.command import run_command

if __name__ == "__main__":
    run_command(main)
