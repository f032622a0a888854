"""Look at every row of the sources of a run before it starts: ``ovr check-data RECIPE [key=value ...]``.

Every image is opened, lengths are measured where ``model.path`` is a folder, and for reinforcement learning the answers
are looked at.  One line for each row that the run could not use, with its place, field, cause and remedy, then a line
for each source.  Exits with 2 where there is such a row, or where a source cannot be opened.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ovr_megatron.config import ConfigError
from ovr_megatron.launch import compose
from ovr_megatron.runtime.command import whole_number


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and check the rows; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="ovr check-data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="name under ovr_megatron/recipes/, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as on the stage's command line")
    parser.add_argument(
        "--rows", type=whole_number(0), default=0, help="look at so many rows of each source (default: all)"
    )
    # Settings may stand on both sides of an option, which `parse_args` does not take.
    arguments = parser.parse_intermixed_args(argv)
    config = compose(arguments.recipe, arguments.overrides)
    if not config.data.sources:
        raise ConfigError("data.sources is empty: give at least one, as in 'data.sources=[{path: rows.jsonl}]'")
    if arguments.rows < 0:
        raise ConfigError(f"--rows={arguments.rows} must be 0 (all) or a number of rows")

    # Imported here, so that a command line is checked before Transformers and datasets are loaded.
    from ovr_megatron.data_checks import report_bad_rows

    return 2 if report_bad_rows(config, arguments.rows) else 0
