"""Stage 2: multimodal PPO with verifiable rewards, vLLM in the trainer's own processes (paper, section 3.2).

``ovr rl --config-name tiny_rl run.dir=RUN model.path=COLD_START``; under ``torchrun`` or ``srun``
for more than one process.  The same command on the same run folder goes on where the run ended.  ``--rollout-only``,
``--rehearse``, ``--train-only FOLDER`` and ``--critic-only FOLDER`` run half of the system: see ``only`` and
``rollouts_from``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ovr_megatron.checkpoint.finished import report_finished
from ovr_megatron.config import RLConfig
from ovr_megatron.launch import read_command_line, spelled_out
from ovr_megatron.runtime.command import run_command

RECIPE = "rl_7b_64gpu"


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says, or print the plan; return the exit code."""
    words = spelled_out(sys.argv[1:] if argv is None else argv)
    command_line = read_command_line(RLConfig, RECIPE, __doc__, words, program="ovr rl")
    # Imports stand here, so that a command line is checked before torch, Megatron and vLLM are loaded.
    if command_line.dry_run:
        from ovr_megatron.plan.report import dry_run

        return dry_run(command_line.config, command_line.recipe)
    if report_finished(command_line.config):
        return 0
    from ovr_megatron.rl.training import run
    from ovr_megatron.runtime.starts import LaunchArgs

    return run(command_line.config, LaunchArgs(command_line.recipe, command_line.overrides))


def script() -> None:
    """Run `main` as the entry point ``ovr-rl``."""
    run_command(main)


if __name__ == "__main__":
    script()
