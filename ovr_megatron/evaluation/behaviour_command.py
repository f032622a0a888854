"""Count cognitive behaviours: ``ovr behaviours NAME=RESPONSES.jsonl ... --out DIR [--judge JUDGE]``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ovr_megatron.config import ConfigError
from ovr_megatron.evaluation.judge_settings import JudgeConfig, add_limits
from ovr_megatron.launch import parse_options
from ovr_megatron.runtime.command import whole_number
from ovr_megatron.runtime.options import add_option, read_options
from ovr_megatron.runtime.terminal import printable


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, judge and write."""
    parser = argparse.ArgumentParser(prog="ovr behaviours", description=__doc__)
    parser.add_argument("responses", nargs="+", metavar="NAME=FILE", help="responses of a checkpoint, in its order")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write, or to go on with")
    add_option(parser, JudgeConfig, "judge", help="lexical, vllm:FOLDER or URL#MODEL (default: lexical)")
    parser.add_argument("--second", metavar="JUDGE", help="another judge, for the agreement of the two on a sample")
    parser.add_argument("--second-key-env", metavar="VAR", help="environment variable with the second endpoint's key")
    parser.add_argument(
        "--sample", type=whole_number(0), default=100, metavar="N", help="traces that the second judge or people see"
    )
    parser.add_argument("--annotate", action="store_true", help="write annotations.jsonl for people to fill in")
    parser.add_argument(
        "--limit", type=whole_number(0), default=0, metavar="N", help="first traces of each file (default: all)"
    )
    add_limits(parser)
    args = parse_options(parser, argv)
    # Here, so that --help does not wait for the libraries of a judge.
    from ovr_megatron.evaluation.judging import format_table, judge_behaviours

    judges = [read_options(JudgeConfig, args)]
    if args.second:  # with its own key, and within the same limits
        judges.append(replace(judges[0], judge=args.second, key_env=args.second_key_env))
    files = parse_files(args.responses)
    result = judge_behaviours(files, judges, args.out, args.limit, args.sample, args.annotate)
    print(printable(format_table(result)))
    print(args.out / "behaviours.json", flush=True)


def parse_files(arguments: Sequence[str]) -> dict[str, Path]:
    """Parse ``NAME=FILE`` arguments to files by name of the checkpoint.

    Raises:
        ConfigError: an argument has no name, or two have the same.
    """
    files: dict[str, Path] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or not name:
            raise ConfigError(f"{argument}: give NAME=FILE, such as rl=runs/eval/mathvision.responses.jsonl")
        if name in files:
            raise ConfigError(f"{name} is given twice; name one of the files otherwise")
        files[name] = Path(path)
    return files
