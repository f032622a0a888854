"""Run ``ovr evaluate``, which `ovr_megatron.evaluation.command` describes."""

from ovr_megatron.evaluation.command import main
from ovr_megatron.runtime.command import run_command

if __name__ == "__main__":
    run_command(main)
