"""Have evaluated responses judged by a model: ``ovr judge SET.json ... --judge JUDGE``.

For problem sets whose official score needs a judge.  Its verdicts go beside those of the rules, into SET.json and
SET.verdicts.jsonl, with the agreement of the two; its answers are kept in judge.jsonl, and none is asked for twice.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ovr_megatron.evaluation.judge_settings import JudgeConfig, add_limits
from ovr_megatron.launch import parse_options
from ovr_megatron.runtime.options import add_option, read_options
from ovr_megatron.runtime.terminal import printable


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, judge and write."""
    parser = argparse.ArgumentParser(
        prog="ovr judge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scores", nargs="+", type=Path, metavar="SET.json", help="scores of ovr evaluate")
    add_option(parser, JudgeConfig, "judge", required=True, help="vllm:FOLDER or URL#MODEL")
    add_limits(parser)
    args = parse_options(parser, argv)
    # Here, so that --help does not wait for the libraries of a judge.
    from ovr_megatron.evaluation.verdicts import judge_responses, summary_line

    config = read_options(JudgeConfig, args)
    for path in args.scores:  # a set is printed when it is done, since a judge may take hours
        summary = judge_responses(path, config)
        print(printable(summary_line(path.stem, summary)), flush=True)
