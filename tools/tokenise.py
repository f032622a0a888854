"""Run ``ovr tokenise``, which `ovr_megatron.cli.tokenise` describes."""

from ovr_megatron.cli.tokenise import main
from ovr_megatron.runtime.command import run_command

if __name__ == "__main__":
    run_command(main)
