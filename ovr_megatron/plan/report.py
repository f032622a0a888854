"""The plan of a recipe, as data and as text."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypedDict

from ovr_megatron.checkpoint.store import weights_of
from ovr_megatron.config import ColdStartConfig, ConfigError, ParallelConfig, RLConfig
from ovr_megatron.data.repetition import SourceUse, show_uses, source_uses
from ovr_megatron.families import ModelShape
from ovr_megatron.families.presets import presets, write_config
from ovr_megatron.plan import cost, flops, memory, search
from ovr_megatron.plan.hardware import find_gpu
from ovr_megatron.plan.parameters import count_parameters, model_state
from ovr_megatron.plan.scenario import Scenario, Span, build_scenario
from ovr_megatron.plan.workload import read_tokenised_workload

_GIB = 1 << 30
_SHOWN_LAYOUTS = 10
_SHOWN_REASONS = 8
_ITEMS_PER_LINE = 5


class PlannedSpan(TypedDict):
    """Steps of one limit of length; ``told`` says where the samples are known from, ``parts`` are seconds."""

    steps: int
    mean_tokens: float
    attention_length: float
    patches: float
    told: str
    limit: int
    tokens: float
    micro_batches: int
    flops: float
    seconds: float
    parts: dict[str, float]


class PlannedEngine(TypedDict):
    """The rollout engines: the tokens that one's cache holds, the longest sequence in tokens, and their number."""

    cache_tokens: int
    longest: int
    engines: int


class Plan(TypedDict):
    """A plan as JSON; sizes in bytes, times in seconds or, where the name says so, hours."""

    model: Mapping[str, Any]
    gpu: Mapping[str, Any]
    world: int
    replicas: int
    layout: Mapping[str, Any]
    rank: Sequence[Mapping[str, Any]]
    phases: Sequence[Mapping[str, Any]]
    fits: bool
    patches_of_a_pack: Mapping[str, Any]
    engine: PlannedEngine | None
    spans: list[PlannedSpan]
    sources: Sequence[Mapping[str, Any]]
    tokens: float
    steps: int
    flops: float
    bubble: float
    at_mfu: dict[str, float]
    by_cost_model: dict[str, float]
    checkpoint_bytes: int
    checkpoints_kept: int
    candidates: Sequence[Mapping[str, Any]] | None


@dataclass(frozen=True)
class Options:
    """Options beside the recipe: GPUs and their kind, the MFU to reckon with, whether to search layouts."""

    world: int
    gpu: str = "h100"
    mfu: float = 0.4
    search: bool = True


def read_shape(path: str) -> tuple[ModelShape, str | None]:
    """Read the sizes of a model and return them with its folder; the name of a preset (7B) has no folder.

    Raises:
        ShapeError: the folder holds no model of a known family.
        ConfigError: neither a folder nor a preset.
    """
    if path in presets() and not Path(path).exists():
        with TemporaryDirectory() as temporary:
            return ModelShape.from_hf(write_config(path, temporary).parent), None
    if not Path(path).exists():
        raise ConfigError(f"model.path={path} is no folder; for a plan it can also be one of {', '.join(presets())}")
    folder = weights_of(path)
    return ModelShape.from_hf(folder), str(folder)


def plan(config: ColdStartConfig | RLConfig, options: Options) -> Plan:
    """Return the plan as data, ready for JSON; bytes, seconds and FLOP.

    Raises:
        ConfigError: a setting that cannot work, as a run would refuse it.
        RowError: a row of the data's sample cannot be used.
    """
    if not 0 < options.mfu <= 1:
        raise ConfigError(f"--mfu {options.mfu} must lie between 0 and 1")
    shape, folder = read_shape(config.model.path)
    gpu = find_gpu(options.gpu)
    scenario = build_scenario(config, shape, gpu, options.world, folder)
    phases = memory.phases(scenario)
    spans = [_span(scenario, span) for span in scenario.spans]
    steps = sum(span["steps"] for span in spans)
    total_flops = sum(span["steps"] * span["flops"] for span in spans)
    flops_per_second = options.mfu * scenario.world * gpu.flops
    hours_at_mfu = total_flops / flops_per_second / 3600
    modelled_hours = search.hours(scenario)
    modelled_gpu_seconds = modelled_hours * 3600 * scenario.world
    first_span = scenario.spans[0]
    return {
        "model": {"path": config.model.path, "parameters": count_parameters(shape)},
        "gpu": asdict(gpu),
        "world": scenario.world,
        "replicas": scenario.dp,
        "layout": {"parallel": asdict(config.parallel), "recompute": config.model.recompute},
        "rank": _ranks(scenario),
        "phases": [_phase(phase) for phase in phases],
        "fits": all(phase.total <= gpu.memory for phase in phases),
        "patches_of_a_pack": {
            "expected": scenario.pack(first_span).patches,
            "room": memory.room_for_patches(scenario),
        },
        "engine": _engine(scenario) if isinstance(config, RLConfig) else None,
        "spans": spans,
        "sources": _sources(config, spans) if folder else [],
        "tokens": sum(span["steps"] * span["tokens"] for span in spans),
        "steps": steps,
        "flops": total_flops,
        "bubble": cost.bubble(scenario, first_span),
        "at_mfu": {"mfu": options.mfu, "hours": hours_at_mfu, "gpu_hours": hours_at_mfu * scenario.world},
        "by_cost_model": {
            "hours": modelled_hours,
            "gpu_hours": modelled_hours * scenario.world,
            "mfu": total_flops / (modelled_gpu_seconds * gpu.flops),
        },
        "checkpoint_bytes": memory.checkpoint_bytes(scenario.config, scenario.shape),
        "checkpoints_kept": config.run.keep_last or -(-steps // config.run.save_every),
        "candidates": [asdict(c) for c in search.candidates(scenario)] if options.search else None,
    }


def _phase(phase: memory.Phase) -> Mapping[str, Any]:
    return {"name": phase.name, "stage": phase.stage, "items": phase.items, "total": phase.total}


def _span(scenario: Scenario, span: Span) -> PlannedSpan:
    seconds = cost.seconds(scenario, span)
    return {
        "steps": span.steps,
        "mean_tokens": span.load.tokens,
        "attention_length": span.load.squares,
        "patches": span.load.patches,
        "told": span.load.basis,
        "limit": span.limit,
        "tokens": scenario.tokens(span),
        "micro_batches": scenario.micro_batches(span),
        "flops": cost.model_flops(scenario, span),
        "seconds": seconds.total,
        "parts": seconds.parts,
    }


def _sources(config: ColdStartConfig | RLConfig, spans: Sequence[PlannedSpan]) -> list[Mapping[str, Any]]:
    """Return rows and epochs of each finite source; a tokenised set counts as one source."""
    if isinstance(config, RLConfig):
        samples = float(config.prompts * sum(span["steps"] for span in spans))
    else:
        samples = sum(span["steps"] * span["tokens"] / span["mean_tokens"] for span in spans)
    if config.data.tokenised:
        _, rows = read_tokenised_workload(config.data.tokenised, config.data.pack_tokens)
        return [asdict(SourceUse(config.data.tokenised, round(rows), samples / rows))]
    return [asdict(use) for use in source_uses(config.data, samples)]


def _ranks(scenario: Scenario) -> list[Mapping[str, Any]]:
    """Return the bytes that a rank of each pipeline stage has of each model."""
    config = scenario.config
    models = [("model", False, scenario)]
    if isinstance(config, RLConfig):
        models = [("policy", False, scenario)]
        if config.algorithm.has_critic:
            models.append(("critic", True, scenario.critic_scenario))
    ranks: list[Mapping[str, Any]] = []
    for name, critic, layout in models:
        parallel = layout.config.parallel
        for stage in range(parallel.pp):
            state = model_state(layout.shape, config.model, parallel, layout.dp, stage, critic=critic)
            ranks.append({"model": name, "stage": stage} | asdict(state))
    return ranks


def _engine(scenario: Scenario) -> PlannedEngine:
    config = scenario.config
    assert isinstance(config, RLConfig)
    engine = memory.engine_memory(config.rollout, scenario.shape, scenario.gpu, config.model.dtype, config.offload)
    cache = engine["vLLM cache"]
    token_bytes = memory.cache_bytes_per_token(scenario.shape, config.rollout, config.model.dtype)
    longest = config.rollout.max_model_len or max(stage.max_tokens for stage in config.curriculum)
    return {
        "cache_tokens": max(0, cache // token_bytes),
        "longest": longest,
        "engines": scenario.world // config.rollout.tp,
    }


def show(plan: Plan) -> str:
    """Return the plan as text."""
    gpu = plan["gpu"]
    parameters = plan["model"]["parameters"]
    total = sum(parameters.values())
    part_counts = [f"{part} {count / 1e6:,.0f} M" for part, count in parameters.items() if count]
    counts = ", ".join(part_counts)
    parallel = ParallelConfig(**plan["layout"]["parallel"])
    lines = [
        f"model       {plan['model']['path']}: {total / 1e9:.3f} B parameters ({counts})",
        f"processes   {plan['world']} x {gpu['name']} ({gpu['memory'] / _GIB:.1f} GiB), {plan['replicas']} replicas",
        f"layout      {search.name(parallel, plan['layout']['recompute'])}",
        "",
        f"{'a rank holds, GiB':20}{'parameters':>14}{'weights':>10}{'gradients':>11}{'optimizer':>11}",
    ]
    for rank in plan["rank"]:
        title = f"{rank['model']}, stage {rank['stage']}"
        weights = f"{rank['weights'] / _GIB:10.2f}"
        gradients = f"{rank['gradients'] / _GIB:11.2f}"
        optimizer = f"{rank['optimizer'] / _GIB:11.2f}"
        lines.append(f"  {title:18}{rank['parameters']:14,}{weights}{gradients}{optimizer}")
    lines += ["", *_phase_lines(plan), "", *_work_lines(plan)]
    if plan["candidates"] is not None:
        lines += ["", *_candidate_lines(plan)]
    return "\n".join(lines)


def _phase_lines(plan: Plan) -> list[str]:
    limit = plan["gpu"]["memory"]
    lines = ["memory of the fullest rank in each phase, GiB"]
    for phase in plan["phases"]:
        verdict = "fits" if phase["total"] <= limit else f"DOES NOT FIT into {limit / _GIB:.1f}"
        lines.append(f"  {phase['name']:16}{phase['total'] / _GIB:8.2f}  {verdict}")
        # An item that would print as 0.00 is left out.
        items = [f"{name} {size / _GIB:.2f}" for name, size in phase["items"].items() if size >= _GIB // 200]
        for start in range(0, len(items), _ITEMS_PER_LINE):
            lines.append(f"    {', '.join(items[start : start + _ITEMS_PER_LINE])}")
    patches = plan["patches_of_a_pack"]
    if patches["room"] is not None:  # else the tower stores nothing, and any number fits
        lines.append(f"  images: {patches['expected']:,} patches in a pack expected, room for {patches['room']:,}")
    if engine := plan["engine"]:
        sequences = engine["cache_tokens"] / engine["longest"]
        lines.append(
            f"  vLLM: {engine['engines']} engines, cache for {engine['cache_tokens']:,} tokens each = {sequences:.1f} "
            f"sequences of {engine['longest']:,}"
        )
    return lines


def _work_lines(plan: Plan) -> list[str]:
    lines = ["work"]
    for span in plan["spans"]:
        packs = f"{span['micro_batches']} packs a replica"
        seconds = [f"{name} {value:.1f}" for name, value in span["parts"].items() if value >= 0.05]
        lines += [
            f"  {span['steps']} steps of {span['tokens'] / 1e6:,.1f} M tokens, {packs}; samples: {span['told']}",
            f"    {span['flops'] / 1e15:,.0f} PFLOP and {span['seconds']:.1f} s a step, in seconds:",
            f"    {', '.join(seconds)}",
        ]
    sources = [SourceUse(**use) for use in plan["sources"]]
    lines += [f"  {line}" for line in show_uses(sources)]
    at_mfu = plan["at_mfu"]
    modelled = plan["by_cost_model"]
    checkpoints = plan["checkpoints_kept"]
    size = plan["checkpoint_bytes"]
    return [
        *lines,
        f"  {plan['steps']} steps, {plan['tokens'] / 1e9:,.2f} G tokens, {plan['flops']:.3e} FLOP; bubble "
        f"{plan['bubble']:.1%}",
        f"  at MFU {at_mfu['mfu']:.0%}: {at_mfu['hours']:,.1f} hours, {at_mfu['gpu_hours']:,.0f} GPU-hours",
        f"  by the cost model: {modelled['hours']:,.1f} hours, {modelled['gpu_hours']:,.0f} GPU-hours "
        f"(MFU {modelled['mfu']:.0%})",
        f"  a checkpoint: {size / 1e9:,.1f} GB; {checkpoints} kept: {size * checkpoints / 1e12:,.2f} TB",
        flops.FORMULA,
    ]


def _candidate_lines(plan: Plan) -> list[str]:
    candidates = plan["candidates"] or ()
    fitting = [candidate for candidate in candidates if not candidate["reason"]]
    reasons: Counter[str] = Counter()
    for candidate in candidates:
        if candidate["reason"]:
            reasons[_kind_of_reason(candidate["reason"])] += 1
    lines = [f"layouts that fit: {len(fitting)} of {len(candidates)}, fastest first", "  hours     GiB"]
    for candidate in fitting[:_SHOWN_LAYOUTS]:
        layout = search.name(ParallelConfig(**candidate["parallel"]), candidate["recompute"])
        lines.append(f"{candidate['hours']:7,.1f}{candidate['bytes'] / _GIB:8.1f}  {layout}")
    lines.append("layouts that cannot be")
    lines += [f"{count:6}  {reason}" for reason, count in reasons.most_common(_SHOWN_REASONS)]
    return lines


def _kind_of_reason(reason: str) -> str:
    """Return the reason without its remedy; reasons that differ in the gigabytes alone become one."""
    if reason.startswith("out of memory"):
        return reason.split(" needs ")[0]
    return reason.partition(";")[0]


def processes(name: str, parallel: ParallelConfig) -> int:
    """Return the processes of a run: the launcher's, or those in a recipe's name (``..._64gpu``), or one replica's."""
    for variable in ("WORLD_SIZE", "SLURM_NTASKS"):
        value = os.environ.get(variable, "")
        if value.isdigit() and int(value) > 1:
            return int(value)
    counts = [part.removesuffix("gpu") for part in name.split("_") if part.endswith("gpu")]
    if counts and counts[0].isdigit():
        return int(counts[0])
    return parallel.ranks


def dry_run(config: ColdStartConfig | RLConfig, name: str) -> int:
    """Print the plan of a run that is about to start, on its first process; no process group, no GPU.  Return 0."""
    # There is no process group to ask: torchrun sets the first variable, srun the second.
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    if rank == "0":
        options = Options(world=processes(name, config.parallel), search=False)
        print(show(plan(config, options)), flush=True)
    return 0
