"""Run ``ovr tiny-model``, which `ovr_megatron.cli.tiny_model` describes."""

from ovr_megatron.cli.tiny_model import main
from ovr_megatron.runtime.command import run_command

if __name__ == "__main__":
    run_command(main)
