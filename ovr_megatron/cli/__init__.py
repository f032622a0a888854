"""Run ``ovr``, the one command of the project: a table of commands, of which only the requested one is imported.

A command is a module with ``main(argv)``, which parses its words and returns an exit code, or None for 0.  The files
under ``tools/`` and ``python -m ovr_megatron.rl`` are other names of the same functions.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NoReturn

from ovr_megatron import __version__
from ovr_megatron.errors import UserError
from ovr_megatron.runtime.command import run_command

_SIMILAR = 0.6  # of `difflib`, from 0 to 1


@dataclass(frozen=True)
class Command:
    """A command of one or two words, its place in the help, and the module that has its ``main``."""

    name: str
    group: str
    summary: str
    module: str


COMMANDS = (
    Command("plan", "Before a run", "memory, FLOP, hours and layouts of a recipe; no GPU needed", "cli.plan"),
    Command("settings", "Before a run", "all settings, as docs/settings.md has them", "cli.settings"),
    Command("reference", "Before a run", "the Python interface, as docs/reference.md has it", "cli.reference"),
    Command("prepare", "Before a run", "any mix of sources to a weighted training set", "curation.command"),
    Command("check-data", "Before a run", "every row of the sources looked at; lists the bad ones", "cli.check_data"),
    Command("tokenise", "Before a run", "texts to a memory-mapped set", "cli.tokenise"),
    Command("preflight", "Before a run", "every node looked at, one process a rank", "cli.preflight"),
    Command("sft", "Training", "supervised fine-tuning: text, images, video", "coldstart.__main__"),
    Command("rl", "Training", "stage 2: multimodal PPO with vLLM rollouts", "rl.__main__"),
    Command("slurm", "Training", "the batch script of a stage: printed, written or submitted", "cli.slurm"),
    Command("replay", "Training", "a saved PPO iteration once more, in any layout", "cli.replay"),
    Command("convert from-hf", "Weights", "a Hugging Face folder to a checkpoint", "cli.convert_from_hf"),
    Command("convert to-hf", "Weights", "policy or critic of a checkpoint to Hugging Face", "cli.convert_to_hf"),
    Command(
        "convert from-megatron",
        "Weights",
        "a checkpoint of Megatron-LM or -Bridge to ours",
        "cli.convert_from_megatron",
    ),
    Command("convert to-megatron", "Weights", "a policy for Megatron-LM or -Bridge", "cli.convert_to_megatron"),
    Command("average", "Weights", "the uniform average of checkpoints", "cli.average"),
    Command("verify", "Weights", "a model through ours and Transformers: logits and gradients", "cli.verify"),
    Command("tiny-model", "Weights", "a small random model", "cli.tiny_model"),
    Command("evaluate", "Results", "a model on problem sets, with vLLM", "evaluation.command"),
    Command("judge", "Results", "a model's verdicts on evaluated responses", "evaluation.verdict_command"),
    Command("behaviours", "Results", "cognitive behaviours in responses", "evaluation.behaviour_command"),
    Command("support", "Results", "problems that training keeps, finds and loses", "evaluation.support_command"),
    Command("grade", "Results", "verdicts on a JSONL file of responses", "cli.grade"),
    Command("report", "Results", "figures, page, summary and model card of a run folder", "cli.report"),
    Command("bench", "Speed", "speed and memory beside named rivals, from a checkout", "cli.bench"),
)


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run the command that ``argv`` begins with; return its exit code.

    Args:
        argv: Words after ``ovr``; None takes those of this process.

    Raises:
        UserError: there is no such command.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words in ([], ["-h"], ["--help"]):
        print(help_text(COMMANDS))
        return 0
    if words == ["--version"]:
        print(f"ovr {__version__}")
        return 0
    family = [command for command in COMMANDS if command.name.startswith(f"{words[0]} ")]
    if family and words[1:] in (["-h"], ["--help"]):
        print(help_text(family))
        return 0
    command, arguments = select(words)
    module = importlib.import_module(f"ovr_megatron.{command.module}")
    code: int | None = module.main(arguments)
    return code


def script() -> NoReturn:
    """Run `main` as the entry point ``ovr``, and as ``python -m ovr_megatron``."""
    run_command(partial(main, None))


def select(words: Sequence[str]) -> tuple[Command, list[str]]:
    """Return the command that ``words`` begin with, and the words that follow its name.

    Raises:
        UserError: no command has this name; the message proposes the nearest one.
    """
    for command in COMMANDS:
        count = len(command.name.split())
        if " ".join(words[:count]) == command.name:
            return command, list(words[count:])
    if longer := [command.name for command in COMMANDS if command.name.startswith(f"{words[0]} ")]:
        raise UserError(f"ovr {words[0]} needs another word: write {' or '.join(f'ovr {name}' for name in longer)}")
    near = difflib.get_close_matches(words[0], [command.name for command in COMMANDS], 1, _SIMILAR)
    remedy = f"did you mean ovr {near[0]}?" if near else "ovr --help lists all commands"
    raise UserError(f"there is no command ovr {words[0]}; {remedy}")


def help_text(commands: Sequence[Command]) -> str:
    """Return the help of ``ovr``: each of ``commands`` with a line, by groups."""
    lines = ["usage: ovr COMMAND [options]", ""]
    width = max(len(command.name) for command in COMMANDS)
    # `groupby` joins neighbours only: COMMANDS has the commands of a group side by side.
    for group, members in groupby(commands, lambda command: command.group):
        lines.append(f"{group}:")
        lines += [f"  {command.name:{width}}  {command.summary}" for command in members]
        lines.append("")
    lines.append("ovr COMMAND --help shows the options of a command, ovr --version the version.")
    lines.append("On several ranks: python -m ovr_megatron.torchrun --nproc-per-node N -m ovr_megatron COMMAND ...")
    return "\n".join(lines)
