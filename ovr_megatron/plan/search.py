"""Every layout of a recipe on its GPUs: which fit, fastest first by `cost`, and why the others cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from ovr_megatron.config import ConfigError, ParallelConfig
from ovr_megatron.plan import cost, memory
from ovr_megatron.plan.setting import Setting

_TENSOR, _PIPELINE, _PARTS, _CONTEXT = (1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4), (1, 2, 4, 8)
_RECOMPUTE = ("none", "selective", "full")
_GIB = 1 << 30


@dataclass(frozen=True)
class Candidate:
    """A layout: the fullest phase's bytes and the hours of the whole run, or the reason that rules it out."""

    parallel: ParallelConfig
    recompute: str
    bytes: int = 0
    hours: float = 0.0
    reason: str = ""


def candidates(setting: Setting) -> list[Candidate]:
    """All layouts, those that fit first, fastest first."""
    found = [_judge(setting, *choice) for choice in _choices(setting.world)]
    return sorted(found, key=lambda c: (bool(c.reason), c.hours, c.bytes))


def _choices(world: int) -> Iterator[tuple[ParallelConfig, str]]:
    """Sizes of at most the world; sequence parallelism wherever tensors are cut; overlap with the sharded optimizer."""
    for tp, pp, vpp, cp, sharded in product(_TENSOR, _PIPELINE, _PARTS, _CONTEXT, (True, False)):
        if tp * pp * cp > world or (vpp > 1 and pp == 1):
            continue
        for sequence, recompute in product((True, False) if tp > 1 else (False,), _RECOMPUTE):
            yield (
                ParallelConfig(
                    tp=tp,
                    pp=pp,
                    vpp=vpp,
                    cp=cp,
                    sequence_parallel=sequence,
                    distributed_optimizer=sharded,
                    overlap=sharded,
                ),
                recompute,
            )


def _judge(setting: Setting, parallel: ParallelConfig, recompute: str) -> Candidate:
    try:
        changed = setting.changed(parallel=parallel, model=replace(setting.config.model, recompute=recompute))
        changed.check()
    except ConfigError as error:
        return Candidate(parallel, recompute, reason=str(error))
    fullest = max(memory.phases(changed), key=lambda phase: phase.total)
    if fullest.total > setting.gpu.memory:
        needs = f"{fullest.total / _GIB:.0f} of {setting.gpu.memory / _GIB:.0f} GiB"
        return Candidate(
            parallel, recompute, fullest.total, reason=f"out of memory: phase {fullest.name} needs {needs}"
        )
    return Candidate(parallel, recompute, fullest.total, hours(changed))


def hours(setting: Setting) -> float:
    """Hours of the whole run by the cost model."""
    return sum(span.steps * cost.seconds(setting, span).total for span in setting.spans) / 3600


def name(parallel: ParallelConfig, recompute: str) -> str:
    """A layout in the words of the recipe."""
    sizes = [f"{key}={getattr(parallel, key)}" for key in ("tp", "pp", "vpp", "cp") if getattr(parallel, key) > 1]
    flags = [
        word
        for word, on in (
            ("sp", parallel.sequence_parallel),
            ("distributed optimizer", parallel.distributed_optimizer),
            ("overlap", parallel.overlap),
        )
        if on
    ]
    return " ".join([*(sizes or ["one rank"]), *flags, *([f"recompute {recompute}"] if recompute else [])])
