"""Prepare a training set: ``ovr prepare --config-name prepare_sft dir=DIR 'data.sources=[{path: FILE}]'``.

docs/data.md describes the stages; the same command goes on where it was interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ovr_megatron.curation.settings import PrepareConfig
from ovr_megatron.launch import read_command_line
from ovr_megatron.runtime.terminal import printable


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the training set that the command line describes; return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    command_line = read_command_line(PrepareConfig, "prepare_sft", __doc__, words, plan=False, program="ovr prepare")
    # Imported here: a wrong command line is refused before the libraries of the stages are loaded, which takes seconds.
    from ovr_megatron.curation.prepare import prepare

    print(printable(f"prepared: {prepare(command_line.config)}"))
    return 0
