"""Checks of the plan's seconds against a job's limits: its warning, its time limit, and the watchdog's timeout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ovr_megatron.plan.plan_json import Plan, PlannedSpan

CAUTION = 1.5  # the plan's seconds assume that nothing disturbs the run, see `ovr_megatron.plan.cost`
START_S = 600.0  # imports, weights, vLLM's compilation
PACKS_OF_A_HANG = 10  # a rank without progress for so many packs hangs


@dataclass(frozen=True)
class Limits:
    """The launcher's limits of the job: seconds between warning and end, and until the end; None: no time limit."""

    warning_s: float
    limit_s: float | None


def read_limits(environment: Mapping[str, str]) -> Limits:
    """Return the limits that ``slurm/launch.sh`` has put into ``environment``."""
    warning = environment.get("OVR_WARNING_S")
    limit = environment.get("OVR_LIMIT_S")
    # The launcher leaves OVR_LIMIT_S empty where the job has no time limit.
    return Limits(
        warning_s=float(warning or 0),
        limit_s=float(limit) if limit else None,
    )


def committed_seconds(span: PlannedSpan) -> float:
    """Return the seconds of a step of ``span`` that a run must complete before it can stop.

    Generation can be abandoned: only its responses are lost.
    """
    generation = span["parts"].get("generate", 0.0)
    return span["seconds"] - generation


def problems(plan: Plan, limits: Limits, hang_timeout_s: float, write_rate: float) -> list[str]:
    """List the limits that the plan's steps do not fit into, one sentence each.

    Args:
        plan: the run's.
        limits: the job's.
        hang_timeout_s: ``run.hang_timeout_s``; 0: none.
        write_rate: bytes a second that all nodes together write to the run folder.
    """
    sentences = []
    spans = plan["spans"]
    pack_seconds = max(committed_seconds(span) / span["micro_batches"] for span in spans)
    hang_seconds = PACKS_OF_A_HANG * pack_seconds
    if 0 < hang_timeout_s < hang_seconds:
        sentences.append(
            f"run.hang_timeout_s={hang_timeout_s:g} would end a healthy run: a pack takes {pack_seconds:.0f} s by the "
            f"plan; use at least {math.ceil(hang_seconds)}"
        )
    if limits.limit_s is None:
        return sentences
    save = plan["checkpoint_bytes"] / write_rate
    longest_commitment = max(committed_seconds(span) for span in spans)
    committed = CAUTION * longest_commitment + save
    if limits.warning_s < committed:
        sufficient_warning = math.ceil(committed / 600) * 600
        sentences.append(
            f"the job is warned {limits.warning_s:.0f} s before its time limit, and what cannot be left of a step "
            f"takes {committed:.0f} s ({CAUTION:g} times the plan's, and {save:.0f} s of saving): submit it with "
            f"OVR_WARNING_S={sufficient_warning}"
        )
    longest_step = CAUTION * max(span["seconds"] for span in spans)
    warning = max(limits.warning_s, committed)
    needed = START_S + longest_step + warning
    if limits.limit_s < needed:
        sentences.append(
            f"the job ends in {limits.limit_s:.0f} s, and to start, end one step and be warned takes {needed:.0f} s by "
            "the plan: submit it with a longer --time"
        )
    return sentences
