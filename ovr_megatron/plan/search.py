"""A search over the layouts of a recipe on its GPUs: those that fit, fastest first by `cost`, and why others do not.

Beside the parallel sizes it tries recomputation and, in reinforcement learning, ``offload`` and ``rollout.tp``.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

from ovr_megatron.config import ConfigError, ParallelConfig, RLConfig
from ovr_megatron.config.layout_text import format_layout
from ovr_megatron.config.model import Recompute
from ovr_megatron.plan import cost, memory
from ovr_megatron.plan.scenario import Scenario

SIZES = (1, 2, 4, 8)
# Settings of every stage, in the order in which they are tried, then those of reinforcement learning.
SEARCHED: Mapping[str, tuple[object, ...]] = {
    "parallel.tp": SIZES,
    "parallel.pp": SIZES,
    "parallel.vpp": (1, 2, 4),
    "parallel.cp": SIZES,
    "parallel.distributed_optimizer": (True, False),
    "parallel.sequence_parallel": (True, False),
    "model.recompute": ("none", "selective", "full"),
}
SEARCHED_IN_RL: Mapping[str, tuple[object, ...]] = {"rollout.tp": SIZES, "offload": (False, True)}
_GIB = 1 << 30
_LAUNCHER = "python -m ovr_megatron.torchrun --nproc-per-node"


@dataclass(frozen=True)
class SearchedLayout:
    """What the search chooses; the last two are those of reinforcement learning, and None elsewhere."""

    parallel: ParallelConfig
    recompute: Recompute
    rollout_tp: int | None = None
    offload: bool | None = None

    @property
    def settings(self) -> dict[str, object]:
        """Return the layout as settings: dotted name and value."""
        settings: dict[str, object] = {"model.recompute": self.recompute}
        for field in fields(self.parallel):
            settings[f"parallel.{field.name}"] = getattr(self.parallel, field.name)
        if self.rollout_tp is not None:
            settings |= {"rollout.tp": self.rollout_tp, "offload": self.offload}
        return settings


@dataclass(frozen=True)
class Candidate:
    """A layout: the fullest phase's bytes and the hours of the whole run, or the reason that rules it out."""

    layout: SearchedLayout
    bytes: int = 0
    hours: float = 0.0
    reason: str = ""


def layout_of(scenario: Scenario) -> SearchedLayout:
    """Return the layout that the recipe itself has."""
    config = scenario.config
    if isinstance(config, RLConfig):
        return SearchedLayout(config.parallel, config.model.recompute, config.rollout.tp, config.offload)
    return SearchedLayout(config.parallel, config.model.recompute)


def candidates(scenario: Scenario, fixed: Collection[str] = ()) -> list[Candidate]:
    """Return the recipe's own layout and all others, those that fit first, fastest first.

    Args:
        scenario: the recipe on its GPUs.
        fixed: names of settings or sections that stay as the recipe has them, as ``parallel.tp`` or ``parallel``.
    """
    # Without repetition, and in this order: the sort below is stable.
    layouts = dict.fromkeys([layout_of(scenario), *_layouts(scenario, fixed)])
    assessed = [_assess(scenario, layout) for layout in layouts]
    return sorted(assessed, key=_rank_candidate)


def _rank_candidate(candidate: Candidate) -> tuple[bool, float, int]:
    """Return a key that sorts candidates: those that fit, by hours, then the others."""
    is_ruled_out = bool(candidate.reason)
    return is_ruled_out, candidate.hours, candidate.bytes


def _layouts(scenario: Scenario, fixed: Collection[str]) -> Iterator[SearchedLayout]:
    """Yield layouts of at most as many ranks as there are, with the values of ``fixed`` settings."""
    own = layout_of(scenario).settings
    searched = dict(SEARCHED)
    if isinstance(scenario.config, RLConfig):
        searched |= SEARCHED_IN_RL
        if not scenario.config.generates:
            del searched["rollout.tp"]  # there is no engine
    choices = []
    for name, values in searched.items():
        # The recipe's own value comes first: of layouts that are equally fast and large the nearest to the recipe wins.
        options = dict.fromkeys([own[name], *values])
        if _is_fixed(name, fixed):
            options = {own[name]: None}
        choices.append(options)
    for combination in product(*choices):
        settings = dict(zip(searched, combination, strict=True))
        if not _is_sensible(settings, scenario):
            continue
        # Overlap goes with the distributed optimizer, and a stage's own number of layers with the number of stages.
        if not _is_fixed("parallel.overlap", fixed):
            settings["parallel.overlap"] = settings["parallel.distributed_optimizer"]
        if settings["parallel.pp"] != own["parallel.pp"]:
            settings |= {"parallel.first_stage_layers": 0, "parallel.last_stage_layers": 0}
        yield _make_layout(own | settings)


def _is_fixed(name: str, fixed: Collection[str]) -> bool:
    """Return whether ``fixed`` has the setting or its section."""
    return name in fixed or name.partition(".")[0] in fixed


def _is_sensible(settings: Mapping[str, Any], scenario: Scenario) -> bool:
    """Return whether the values go together; what else is impossible is left to `_assess`, which says why."""
    tp = settings["parallel.tp"]
    pp = settings["parallel.pp"]
    ranks = tp * pp * settings["parallel.cp"]
    if ranks > scenario.trainers or settings.get("rollout.tp", 1) > scenario.engine_ranks:
        return False
    if settings["parallel.vpp"] > 1 and pp == 1:  # only a pipeline can be interleaved
        return False
    return tp > 1 or not settings["parallel.sequence_parallel"]


def _make_layout(settings: Mapping[str, Any]) -> SearchedLayout:
    """Build a layout of its settings."""
    parallel = {}
    for field in fields(ParallelConfig):
        parallel[field.name] = settings[f"parallel.{field.name}"]
    return SearchedLayout(
        parallel=ParallelConfig(**parallel),
        recompute=settings["model.recompute"],
        rollout_tp=settings.get("rollout.tp"),
        offload=settings.get("offload"),
    )


def with_layout(scenario: Scenario, layout: SearchedLayout) -> Scenario:
    """Return the same work in another layout."""
    config = scenario.config
    settings: dict[str, object] = {
        "parallel": layout.parallel,
        "model": replace(config.model, recompute=layout.recompute),
    }
    if layout.rollout_tp is not None and layout.offload is not None:
        settings |= {"rollout": replace(config.rollout, tp=layout.rollout_tp), "offload": layout.offload}
    return scenario.with_settings(**settings)


def _assess(scenario: Scenario, layout: SearchedLayout) -> Candidate:
    """Return the candidate of one layout: its memory and hours, or the reason that rules it out."""
    try:
        variant = with_layout(scenario, layout)
        variant.check()
    except ConfigError as error:
        return Candidate(layout, reason=str(error))
    fullest = memory.fullest_phase(memory.phases(variant))
    limit = scenario.gpu.memory
    if fullest.total > limit:
        needs = f"{fullest.total / _GIB:.0f} of {limit / _GIB:.0f} GiB"
        reason = f"out of memory: phase {fullest.name} needs {needs}"
        return Candidate(layout, fullest.total, reason=reason)
    if shortage := memory.cache_shortage(variant):
        return Candidate(layout, fullest.total, reason=shortage)
    return Candidate(layout, fullest.total, hours(variant))


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


def describe(layout: SearchedLayout) -> str:
    """Return the text of a layout with all that the search chooses."""
    text = name(layout.parallel, layout.recompute)
    if layout.rollout_tp is not None:
        text += f" rollout.tp={layout.rollout_tp}"
    if layout.offload:
        text += " offload"
    return text


def fixed_names(overrides: Sequence[str]) -> frozenset[str]:
    """Return the names of the settings that a command line gives."""
    return frozenset(override.lstrip("+~").partition("=")[0] for override in overrides)


def _nodes(world: int, per_node: int) -> str:
    """Return the options of sbatch for ``world`` ranks on equal nodes of at most ``per_node`` GPUs, few of them."""
    nodes = -(-world // per_node)
    while world % nodes:
        nodes += 1
    ranks = world // nodes
    options = f"--nodes={nodes}"
    if ranks != per_node:  # the scripts ask for whole nodes
        options += f" --ntasks-per-node={ranks} --gpus-per-node={ranks}"
    return options


def command_line(scenario: Scenario, layout: SearchedLayout, recipe: str, overrides: Sequence[str]) -> str:
    """Return the command that runs ``recipe`` in this layout on the scenario's processes, ready for a shell.

    On one node it is torchrun's, beyond it Slurm's.

    Args:
        scenario: the recipe with its own layout.
        layout: of the run.
        recipe: name or path.
        overrides: of the command line that was planned; they come first.
    """
    own = layout_of(scenario).settings
    settings = list(overrides)
    for setting, value in layout.settings.items():
        if value != own[setting]:
            text = str(value).lower()  # Hydra writes true and false
            settings.append(f"{setting}={text}")
    is_rl = isinstance(scenario.config, RLConfig)
    per_node = scenario.gpu.per_node
    if scenario.world > per_node:
        script = "slurm/rl.sh" if is_rl else "slurm/coldstart_64gpu.sh"
        options = _nodes(scenario.world, per_node)
        return f"OVR_RECIPE={shlex.quote(recipe)} sbatch {options} {shlex.join([script, *settings])}"
    stage = "rl" if is_rl else "sft"
    words = shlex.join([stage, "--config-name", recipe, *settings])
    if scenario.world == 1:
        return f"ovr {words}"
    return f"{_LAUNCHER} {scenario.world} -m ovr_megatron {words}"
