"""Make the batch script of a stage for Slurm: ``ovr slurm rl --nodes 2 run.dir=RUN model.path=MODEL [--submit]``.

The script is printed, written to a file, or submitted.  It is `slurm/rl.sh` or `slurm/coldstart_64gpu.sh` of the source
tree with this interpreter, these ``key=value`` and these limits: pre-flight, the run, requeue, a line of summary.  The
settings are checked first.  Run by ``bash`` it starts the stage on this machine.  docs/slurm.md has its variables.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from ovr_megatron import __version__
from ovr_megatron.cli.preflight import STAGES
from ovr_megatron.config import ColdStartConfig, RLConfig, build
from ovr_megatron.errors import UserError
from ovr_megatron.launch import RECIPES, compose_values, recipe_path, spelled_out
from ovr_megatron.plan.hardware import gpus_in_name
from ovr_megatron.runtime.command import whole_number
from ovr_megatron.runtime.files import write_whole

PACKAGE = Path(__file__).resolve().parents[1]
# A link to slurm/ in a source tree; a wheel has the files.
SCRIPTS = (PACKAGE / "slurm").resolve()
_STAGE_SCRIPTS = {"sft": "coldstart_64gpu.sh", "coldstart": "coldstart_64gpu.sh", "rl": "rl.sh"}
_MARK = "# Written by ovr slurm"
_NODE_GPUS = 8


class SlurmError(UserError):
    """A batch script that cannot be made, written or submitted; the message says what to change."""


@dataclass(frozen=True)
class StageScript:
    """A stage's script in slurm/, as far as a job takes it over.

    Attributes:
        options: options of its ``#SBATCH`` lines, in order.
        module: name of the stage for `launch_stage`.
        recipe: recipe of a job that names none.
    """

    options: tuple[str, ...]
    module: str
    recipe: str


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, then print, write or submit the script; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="ovr slurm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("stage", choices=STAGES)
    add("overrides", nargs="*", metavar="key=value", help="as for the stage itself")
    add("--config-name", metavar="RECIPE", help="as for the stage itself")
    add("--nodes", type=whole_number(1), help="nodes (default: enough for a recipe named ..._64gpu, or one replica)")
    add("--gpus-per-node", type=whole_number(1), metavar="N", help="GPUs and ranks of a node (default: 8 at most)")
    add("--time", metavar="LIMIT", help="time limit, as sbatch takes it (default: a day); the job requeues itself")
    add("--warning", type=whole_number(1), metavar="S", help="seconds before the limit at which it saves and leaves")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="another option: --sbatch=--partition=gpu")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--write", type=Path, metavar="FILE", help="write the script there, for sbatch or bash")
    target.add_argument("--submit", action="store_true", help="give the script to sbatch")
    words = spelled_out(sys.argv[1:] if argv is None else argv)
    # Settings may stand on both sides of an option, which `parse_args` does not take.
    arguments = parser.parse_intermixed_args(words)
    text = job_script(arguments)
    if arguments.submit:
        return submit(text, arguments.overrides)
    if arguments.write:
        write(text, arguments.write)
    else:
        print(text, end="")
    return 0


def job_script(arguments: argparse.Namespace) -> str:
    """Return the batch script of a parsed command line, once its settings are checked.

    Raises:
        UserError: a recipe, a setting or an option of sbatch that cannot work.
    """
    stage = read_stage_script(SCRIPTS / _STAGE_SCRIPTS[arguments.stage])
    path = recipe_path(arguments.config_name or stage.recipe)
    config = check_settings(arguments.stage, path, arguments.overrides)
    # A recipe of the package by its name, a file of the user's by its path: the job may start in another folder.
    recipe = path.stem if path.parent == RECIPES else str(path)
    gpus = gpus_in_name(path.stem) or config.parallel.ranks  # as the plan counts them
    options = merge_options(stage.options, job_options(arguments, gpus))
    interpreter = shlex.quote(sys.executable)
    launcher = shlex.quote(str(SCRIPTS / "launch.sh"))
    words = shlex.join([stage.module, recipe, *arguments.overrides])
    lines = [
        "#!/usr/bin/env bash",
        f"{_MARK}, ovr-megatron {__version__}. Options of sbatch and SBATCH_* variables come before the lines below,",
        "# key=value behind the name of this script before that of its last line.",
        *(f"#SBATCH {option}" for option in options),
        "set -euo pipefail",
        "",
    ]
    if arguments.warning:
        lines.append(f'export OVR_WARNING_S="${{OVR_WARNING_S:-{arguments.warning}}}"')
    tree = PACKAGE.parent
    if (tree / "setup.cfg").is_file():
        lines.append(f"root={shlex.quote(str(tree))}")
    lines += [
        f"interpreter={interpreter}",
        f"source {launcher}",
        f'launch_stage {words} "$@"',
    ]
    return "\n".join(lines) + "\n"


def read_stage_script(path: Path) -> StageScript:
    """Read the ``#SBATCH`` options, the stage and the recipe of one of the scripts in slurm/.

    Raises:
        SlurmError: the package has no scripts, as where its link to slurm/ was lost.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SlurmError(f"{path}: {error.strerror}; install the package again, from a wheel") from None
    options = re.findall(r"^#SBATCH (--.+)$", text, re.MULTILINE)
    launch = re.search(r"^launch_stage (\w+) (\w+)", text, re.MULTILINE)
    assert launch is not None, path
    module, recipe = launch.groups()
    return StageScript(tuple(options), module, recipe)


def check_settings(stage: str, path: Path, overrides: Sequence[str]) -> ColdStartConfig | RLConfig:
    """Return the recipe with the overrides, checked; run.dir and model.path may come from the job's environment.

    Raises:
        UserError: an unknown key, or a value that cannot work.
    """
    schema, _ = STAGES[stage]
    values = compose_values(schema, path, overrides)
    missing = OmegaConf.missing_keys(values)
    if "run.dir" in missing:
        values.run.dir = "OVR_RUN"
    if "model.path" in missing:
        values.model.path = "OVR_MODEL"
    return build(schema, values)


def job_options(arguments: argparse.Namespace, gpus: int) -> list[str]:
    """Return the options of sbatch that the command line and a run on so many ``gpus`` ask for.

    Raises:
        SlurmError: an option that is none.
    """
    per_node = arguments.gpus_per_node or min(gpus, _NODE_GPUS)
    nodes = arguments.nodes or -(-gpus // per_node)
    options = [f"--nodes={nodes}", f"--ntasks-per-node={per_node}", f"--gpus-per-node={per_node}"]
    if arguments.time:
        options.append(f"--time={arguments.time}")
    if arguments.warning:
        options.append(f"--signal=B:USR1@{arguments.warning}")
    for option in [*options, *arguments.sbatch]:
        if not re.fullmatch(r"--[a-z][a-z-]*(=.+)?", option):
            raise SlurmError(f"{option!r} is no option of sbatch; write it in one word, as --sbatch=--partition=gpu")
    return [*options, *arguments.sbatch]


def merge_options(defaults: Sequence[str], options: Sequence[str]) -> list[str]:
    """Return ``defaults`` with those replaced that ``options`` name, too, and the others of ``options`` behind them."""
    merged = {option.partition("=")[0]: option for option in [*defaults, *options]}
    return list(merged.values())


def write(text: str, path: Path) -> None:
    """Write the script to ``path``, executable, and print the path.

    Raises:
        SlurmError: a file is there that this command has not written.
    """
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        raise SlurmError(f"{path} was not written by ovr slurm, so it is left alone; give another --write")
    if not path.parent.is_dir():
        raise SlurmError(f"{path.parent} is no folder; make it, or give another --write")
    write_whole(path, text).chmod(0o755)
    print(path)


def submit(text: str, overrides: Sequence[str]) -> int:
    """Give the script to sbatch, whose output is shown; return its exit code.

    Raises:
        SlurmError: there is no run folder, or no sbatch.
    """
    has_run = any(word.startswith("run.dir=") for word in overrides)
    if not has_run and not os.environ.get("OVR_RUN"):
        raise SlurmError("there is no run folder; give run.dir=DIR, on a file system that all nodes share")
    try:
        return subprocess.run(["sbatch"], input=text, text=True).returncode
    except FileNotFoundError:
        reason = "sbatch is not on this machine; write the script with --write FILE and submit it where it is"
        raise SlurmError(reason) from None
