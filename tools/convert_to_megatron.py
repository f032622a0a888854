"""Run ``ovr convert to-megatron``, which `ovr_megatron.cli.convert_to_megatron` describes."""

from ovr_megatron.cli.convert_to_megatron import main
from ovr_megatron.runtime.command import run_command

if __name__ == "__main__":
    run_command(main)
