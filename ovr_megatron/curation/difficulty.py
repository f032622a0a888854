"""Pass rate of every prompt under a model, by vLLM; prompts that are always or hardly ever answered go.

A prompt that all responses get right, or none, teaches nothing (Open-Reasoner-Zero and DAPO filter both ends).  The
rate goes into the row as ``pass_rate``, and as ``difficulty`` (1 - rate).  Supervised rows pass.
"""

from __future__ import annotations

from ovr_megatron.curation.engines import engine_files, run_engines
from ovr_megatron.curation.journal import Journal
from ovr_megatron.curation.reward_rules import check_sources
from ovr_megatron.curation.settings import PrepareConfig
from ovr_megatron.curation.stage import PrepareStage, Work, listing

TRIES = "tries"


def run(work: Work) -> None:
    """Have every prompt answered and graded, then keep those between the bounds."""
    check_sources(work.config)
    run_engines(work, "attempt")
    config = work.config.difficulty
    found = {}
    for path in sorted(work.folder.glob(f"{TRIES}.*.jsonl")):
        with Journal(path) as journal:
            found.update({entry["key"]: entry for entry in journal})
    for index, row in enumerate(work.rows()):
        source, entry = row.get("source", ""), found.get(index)
        if entry is None:
            work.keep(row, source)
        elif "error" in entry:
            work.drop(row, source, "cannot be asked or graded", error=entry["error"])
        else:
            rate = entry["right"] / entry["samples"]
            work.report.add_value("pass rate", rate)
            if rate < config.low or rate > config.high:
                reason = "too hard" if rate < config.low else "too easy"
                work.drop(row, source, reason, pass_rate=round(rate, 4))
            else:
                work.keep({**row, "difficulty": round(1 - rate, 6)}, source, pass_rate=round(rate, 6))


def inputs(config: PrepareConfig) -> object:
    """The files of the model."""
    return listing(config.difficulty.model or "")


def settings(config: PrepareConfig) -> list[object]:
    """What decides the outcome."""
    reward = config.reward
    return [config.difficulty, config.data, reward.rules, reward.timeout_s, reward.memory_mib, config.seed]


STAGE = PrepareStage("difficulty", run, settings, inputs, (*engine_files("attempt"), f"{TRIES}.*.jsonl"))
