"""Run ``ovr plan``, which `ovr_megatron.cli.plan` describes."""

from ovr_megatron.cli.plan import main
from ovr_megatron.runtime.command import run_command

if __name__ == "__main__":
    run_command(main)
