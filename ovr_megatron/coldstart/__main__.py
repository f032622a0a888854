"""Supervised fine-tuning (SFT) on chats of text, images and video.

``ovr sft --config-name sft_7b_8gpu run.dir=RUN model.path=MODEL 'data.sources=[{path: chats.jsonl}]'``; under
``torchrun`` or ``srun`` for more than one process.  Without ``--config-name`` the recipe is that of the paper's cold
start.  The same command on the same run folder goes on where the run ended.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ovr_megatron.checkpoint.finished import report_finished
from ovr_megatron.config import ColdStartConfig
from ovr_megatron.launch import read_command_line
from ovr_megatron.runtime.command import run_command

RECIPE = "cold_start_7b_64gpu"


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says, or print the plan; return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    command_line = read_command_line(ColdStartConfig, RECIPE, __doc__, words, program="ovr sft")
    # Imports stand here, so that a command line is checked before torch and Megatron are loaded.
    if command_line.dry_run:
        from ovr_megatron.plan.report import dry_run

        return dry_run(command_line.config, command_line.recipe)
    if report_finished(command_line.config):
        return 0
    from ovr_megatron.coldstart.training import run
    from ovr_megatron.runtime.starts import LaunchArgs

    return run(command_line.config, LaunchArgs(command_line.recipe, command_line.overrides))


def script() -> None:
    """Run `main` as the entry point ``ovr-coldstart``."""
    run_command(main)


if __name__ == "__main__":
    script()
