"""Look at every node before a run starts: ``srun ovr preflight sft [--config-name RECIPE] [key=value ...]``.

Started like the run itself, one process a rank.  The first rank prints one line of figures, or one sentence for each
problem; the exit status is 0, or 2 where there is a problem.  Floors and the number of GPUs come from the
environment, see docs/slurm.md; ``--settings`` prints the table of settings and leaves.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from ovr_megatron.config import ColdStartConfig, RLConfig, build
from ovr_megatron.errors import UserError
from ovr_megatron.launch import compose_values, recipe_path, spelled_out
from ovr_megatron.runtime import environment
from ovr_megatron.runtime.terminal import printable

SFT = (ColdStartConfig, "cold_start_7b_64gpu")
# The stage has two names: that of its command, ``ovr sft``, and that of its module.
STAGES: dict[str, tuple[type[ColdStartConfig | RLConfig], str]] = {
    "sft": SFT,
    "coldstart": SFT,
    "rl": (RLConfig, "rl_7b_64gpu"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the checks; return the exit code."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="ovr preflight", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", nargs="?", default="sft", choices=STAGES)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for the stage itself")
    parser.add_argument("--config-name", metavar="RECIPE", help="as for the stage itself")
    parser.add_argument("--settings", action="store_true", help="print the table of environment settings")
    words = spelled_out(sys.argv[1:] if argv is None else argv)
    # The command line is that of the stage, whose option --dry-run means nothing here.
    arguments = parser.parse_intermixed_args([word for word in words if word != "--dry-run"])
    if arguments.settings:
        print(environment.table())
        return 0
    schema, default_recipe = STAGES[arguments.stage]
    try:
        values = compose_values(schema, recipe_path(arguments.config_name or default_recipe), arguments.overrides)
        config = build(schema, values)
    except UserError as error:
        # All ranks have the same command line: one message is enough.
        if os.environ.get("RANK", "0") == "0":
            print(printable(f"preflight: {error}"), flush=True)
        return 2

    # Imported here, so that a command line is checked before torch is loaded.
    from ovr_megatron.preflight import check

    return check(config, began)
