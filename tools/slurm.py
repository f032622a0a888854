"""Run ``ovr slurm``, which `ovr_megatron.cli.slurm` describes."""

from ovr_megatron.cli.slurm import main
from ovr_megatron.runtime.command import run_command

if __name__ == "__main__":
    run_command(main)
