"""Run ``ovr support``, which `ovr_megatron.evaluation.support_command` describes."""

from ovr_megatron.evaluation.support_command import main
from ovr_megatron.runtime.command import run_command

if __name__ == "__main__":
    run_command(main)
