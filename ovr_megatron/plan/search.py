"""A search over the layouts of a recipe on its GPUs: those that fit, fastest first by `cost`, and why others do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from ovr_megatron.config import ConfigError, ParallelConfig
from ovr_megatron.config.layout_text import format_layout
from ovr_megatron.config.model import Recompute
from ovr_megatron.plan import cost, memory
from ovr_megatron.plan.scenario import Scenario

_TP_SIZES = (1, 2, 4, 8)
_PP_SIZES = (1, 2, 4, 8)
_VPP_SIZES = (1, 2, 4)
_CP_SIZES = (1, 2, 4, 8)
_RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
_GIB = 1 << 30


@dataclass(frozen=True)
class Candidate:
    """A layout: the fullest phase's bytes and the hours of the whole run, or the reason that rules it out."""

    parallel: ParallelConfig
    recompute: Recompute
    bytes: int = 0
    hours: float = 0.0
    reason: str = ""


def candidates(scenario: Scenario) -> list[Candidate]:
    """Return all layouts, those that fit first, fastest first."""
    layouts = [_assess(scenario, parallel, recompute) for parallel, recompute in _layouts(scenario.world)]
    return sorted(layouts, key=_rank_candidate)


def _rank_candidate(candidate: Candidate) -> tuple[bool, float, int]:
    """Return a key that sorts candidates: those that fit, by hours, then the others."""
    is_ruled_out = bool(candidate.reason)
    return is_ruled_out, candidate.hours, candidate.bytes


def _layouts(world: int) -> Iterator[tuple[ParallelConfig, Recompute]]:
    """Yield layouts of at most ``world`` ranks with each kind of recomputation.

    Sequence parallelism is tried wherever tensors are cut; overlap goes with the distributed optimizer.
    """
    for tp, pp, vpp, cp, sharded in product(_TP_SIZES, _PP_SIZES, _VPP_SIZES, _CP_SIZES, (True, False)):
        # Only a pipeline can be interleaved.
        if tp * pp * cp > world or (vpp > 1 and pp == 1):
            continue
        sequence_parallel = (True, False) if tp > 1 else (False,)
        for sequence, recompute in product(sequence_parallel, _RECOMPUTE):
            parallel = ParallelConfig(
                tp=tp,
                pp=pp,
                vpp=vpp,
                cp=cp,
                sequence_parallel=sequence,
                distributed_optimizer=sharded,
                overlap=sharded,
            )
            yield parallel, recompute


def _assess(scenario: Scenario, parallel: ParallelConfig, recompute: Recompute) -> Candidate:
    """Return the candidate of one layout: its memory and hours, or the reason that rules it out."""
    try:
        model = replace(scenario.config.model, recompute=recompute)
        variant = scenario.with_settings(parallel=parallel, model=model)
        variant.check()
    except ConfigError as error:
        return Candidate(parallel, recompute, reason=str(error))
    fullest = memory.fullest_phase(memory.phases(variant))
    limit = scenario.gpu.memory
    if fullest.total > limit:
        needs = f"{fullest.total / _GIB:.0f} of {limit / _GIB:.0f} GiB"
        reason = f"out of memory: phase {fullest.name} needs {needs}"
        return Candidate(parallel, recompute, fullest.total, reason=reason)
    return Candidate(parallel, recompute, fullest.total, hours(variant))


def hours(scenario: Scenario) -> float:
    """Return the hours of the whole run by the cost model."""
    span_seconds = []
    for span in scenario.spans:
        step = cost.seconds(scenario, span)
        span_seconds.append(span.steps * step.total)
    return sum(span_seconds) / 3600


def name(parallel: ParallelConfig, recompute: str) -> str:
    """Return the text of a layout, and with ``recompute`` what the backward pass computes again."""
    layout = format_layout(parallel)
    return f"{layout} recompute {recompute}" if recompute else layout
