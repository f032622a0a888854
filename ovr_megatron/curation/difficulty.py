"""Pass rate of every prompt under a model, by vLLM; prompts that are too easy or too hard are dropped.

A prompt that all responses get right, or none, teaches nothing (Open-Reasoner-Zero and DAPO filter both ends).  The
rate is written into the row as ``pass_rate``, and as ``difficulty`` (1 - rate).  Supervised rows pass.
"""

from __future__ import annotations

from typing import TypedDict, cast

from ovr_megatron.curation.engines import engine_files, run_engines
from ovr_megatron.curation.reward_rules import check_sources, judge_settings
from ovr_megatron.curation.settings import PrepareConfig
from ovr_megatron.curation.stage import PrepareStage, Work, listing
from ovr_megatron.runtime.journal import Journal

TRIES = "tries"


class PassRate(TypedDict, total=False):
    """Number of right responses to a prompt out of ``samples``, or the ``error`` for which there is none."""

    right: int
    samples: int
    error: str


def run(work: Work) -> None:
    """Generate and grade responses to every prompt, then keep the prompts between the bounds."""
    check_sources(work.config)
    run_engines(work, "attempt")
    config = work.config.difficulty
    results: dict[int, PassRate] = {}
    for path in sorted(work.folder.glob(f"{TRIES}.*.jsonl")):
        with Journal(path) as journal:
            for entry in journal:
                results[entry["key"]] = cast(PassRate, entry)
    for index, row in enumerate(work.rows()):
        source = row.get("source", "")
        result = results.get(index)
        if result is None:
            work.keep(row, source)
            continue
        if "error" in result:
            work.drop(row, source, "cannot be asked or graded", error=result["error"])
            continue
        rate = result["right"] / result["samples"]
        work.report.add_value("pass rate", rate)
        if rate < config.low:
            work.drop(row, source, "too hard", pass_rate=round(rate, 4))
        elif rate > config.high:
            work.drop(row, source, "too easy", pass_rate=round(rate, 4))
        else:
            rated_row: dict[str, object] = {**row, "difficulty": round(1 - rate, 6)}
            work.keep(rated_row, source, pass_rate=round(rate, 6))


def inputs(config: PrepareConfig) -> object:
    """Return a fingerprint of the model's files."""
    return listing(config.difficulty.model or "")


def settings(config: PrepareConfig) -> list[object]:
    """Return the settings on which the pass rates depend."""
    reward = config.reward
    return [
        config.difficulty,
        config.data,
        reward.rules,
        *judge_settings(reward),
        reward.timeout_s,
        reward.memory_mib,
        config.seed,
    ]


STAGE = PrepareStage(
    "difficulty",
    run,
    settings,
    inputs,
    (*engine_files("attempt"), f"{TRIES}.*.jsonl"),
)
