"""Count cognitive behaviours: ``ovr behaviours NAME=RESPONSES.jsonl ... --out DIR [--judge JUDGE]``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from ovr_megatron.config import ConfigError
from ovr_megatron.runtime.command import whole_number
from ovr_megatron.runtime.terminal import printable


class JudgeLimits(TypedDict):
    """The keywords of `JudgeConfig` that all judges of a command share."""

    allow_http: bool
    max_tokens: int
    max_requests: int
    max_total_tokens: int


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, judge and write."""
    parser = argparse.ArgumentParser(prog="ovr behaviours", description=__doc__)
    parser.add_argument("responses", nargs="+", metavar="NAME=FILE", help="responses of a checkpoint, in its order")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write, or to go on with")
    parser.add_argument("--judge", default="lexical", help="lexical, vllm:FOLDER or URL#MODEL (default: lexical)")
    parser.add_argument("--second", metavar="JUDGE", help="another judge, for the agreement of the two on a sample")
    parser.add_argument("--second-key-env", metavar="VAR", help="environment variable with the second endpoint's key")
    parser.add_argument(
        "--sample", type=whole_number(0), default=100, metavar="N", help="traces that the second judge or people see"
    )
    parser.add_argument("--annotate", action="store_true", help="write annotations.jsonl for people to fill in")
    parser.add_argument(
        "--limit", type=whole_number(0), default=0, metavar="N", help="first traces of each file (default: all)"
    )
    add_budget(parser)
    args = parser.parse_args(argv)
    # Here, so that --help does not wait for the libraries of a judge.
    from ovr_megatron.evaluation.judges import JudgeConfig
    from ovr_megatron.evaluation.judging import format_table, judge_behaviours

    budget = budget_of(args)
    judges = [JudgeConfig(judge=args.judge, key_env=args.key_env, **budget)]
    if args.second:  # with its own key, and within the same limits
        judges.append(JudgeConfig(judge=args.second, key_env=args.second_key_env, **budget))
    files = parse_files(args.responses)
    result = judge_behaviours(files, judges, args.out, args.limit, args.sample, args.annotate)
    print(printable(format_table(result)))
    print(args.out / "behaviours.json", flush=True)


def add_budget(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that every judge model has."""
    parser.add_argument("--key-env", metavar="VAR", help="environment variable with the endpoint's key")
    http_help = "send the key to another machine without encryption"
    parser.add_argument("--allow-http", action="store_true", help=http_help)
    parser.add_argument("--max-tokens", type=whole_number(1), default=1024, help="of a judge's answer")
    parser.add_argument(
        "--max-requests", type=whole_number(0), default=0, help="budget of all runs in the folder (0: none)"
    )
    parser.add_argument(
        "--max-total-tokens", type=whole_number(0), default=0, help="budget of all runs in the folder (0: none)"
    )


def budget_of(args: argparse.Namespace) -> JudgeLimits:
    """Return the limits of a judge as keywords of `JudgeConfig`."""
    return {
        "allow_http": args.allow_http,
        "max_tokens": args.max_tokens,
        "max_requests": args.max_requests,
        "max_total_tokens": args.max_total_tokens,
    }


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
