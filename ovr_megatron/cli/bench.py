"""Run the benchmarks of a checkout: ``ovr bench model [--json FILE]`` is ``tools/bench.py``, which is not installed."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from ovr_megatron.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool with the words of ``argv``; it leaves the process with its own exit code.

    Raises:
        UserError: the package is installed without its source tree.
    """
    tool = ROOT / "tools" / "bench.py"
    if not tool.is_file():
        raise UserError(f"{tool} is not there: the benchmarks are not installed; run ovr bench from a source tree")
    # The tool is a script and reads the words of the process, its own name first.
    sys.argv = [str(tool), *(sys.argv[1:] if argv is None else argv)]
    runpy.run_path(str(tool), run_name="__main__")
