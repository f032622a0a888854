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


class PlannedModel(TypedDict):
    """The model: its folder or preset, and its parameters by part."""

    path: str
    parameters: dict[str, int]


class PlannedLayout(TypedDict):
    """The recipe's layout: the fields of `ParallelConfig`, and the kind of recomputation."""

    parallel: Mapping[str, Any]
    recompute: str


class PlannedRank(TypedDict):
    """One model on a rank of one pipeline stage, as in `ModelState`."""

    model: str
    stage: int
    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int


class PlannedPhase(TypedDict):
    """A phase on the pipeline stage that needs most in it."""

    name: str
    stage: int
    items: dict[str, int]
    total: int


class PlannedPatches(TypedDict):
    """Patches of a pack: those of the expected images, and those that fit; None: any number does."""

    expected: int
    room: int | None


class PlannedSource(TypedDict):
    """A finite source, as in `SourceUse`."""

    name: str
    rows: int
    epochs: float


class PlannedCandidate(TypedDict):
    """A layout of the search, as in `search.Candidate`."""

    parallel: Mapping[str, Any]
    recompute: str
    bytes: int
    hours: float
    reason: str


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

    model: PlannedModel
    gpu: Mapping[str, Any]
    world: int
    replicas: int
    layout: PlannedLayout
    rank: list[PlannedRank]
    phases: list[PlannedPhase]
    fits: bool
    patches_of_a_pack: PlannedPatches
    engine: PlannedEngine | None
    spans: list[PlannedSpan]
    sources: list[PlannedSource]
    tokens: float
    steps: int
    flops: float
    bubble: float
    at_mfu: dict[str, float]
    by_cost_model: dict[str, float]
    checkpoint_bytes: int
    checkpoints_kept: int
    candidates: list[PlannedCandidate] | None


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
    known_presets = presets()
    # A folder that exists comes before a preset of the same name.
    exists = Path(path).exists()
    if path in known_presets and not exists:
        with TemporaryDirectory() as temporary:
            config_file = write_config(path, temporary)
            return ModelShape.from_hf(config_file.parent), None
    if not exists:
        names = ", ".join(known_presets)
        raise ConfigError(f"model.path={path} is no folder; for a plan it can also be one of {names}")
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
    total_tokens = sum(span["steps"] * span["tokens"] for span in spans)
    first_span = scenario.spans[0]
    checkpoints = config.run.keep_last
    if not checkpoints:
        checkpoints = -(-steps // config.run.save_every)
    return {
        "model": {"path": config.model.path, "parameters": count_parameters(shape)},
        "gpu": asdict(gpu),
        "world": scenario.world,
        "replicas": scenario.dp,
        "layout": {
            "parallel": asdict(config.parallel),
            "recompute": config.model.recompute,
        },
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
        "tokens": total_tokens,
        "steps": steps,
        "flops": total_flops,
        "bubble": cost.bubble(scenario, first_span),
        "at_mfu": _time_at_mfu(scenario, total_flops, options.mfu),
        "by_cost_model": _modelled_time(scenario, total_flops),
        "checkpoint_bytes": memory.checkpoint_bytes(config, shape),
        "checkpoints_kept": checkpoints,
        "candidates": _candidates(scenario) if options.search else None,
    }


def _time_at_mfu(scenario: Scenario, total_flops: float, mfu: float) -> dict[str, float]:
    """Return the hours of the whole run at an MFU that is taken as given."""
    flops_per_second = mfu * scenario.world * scenario.gpu.flops
    hours = total_flops / flops_per_second / 3600
    return {
        "mfu": mfu,
        "hours": hours,
        "gpu_hours": hours * scenario.world,
    }


def _modelled_time(scenario: Scenario, total_flops: float) -> dict[str, float]:
    """Return the hours of the whole run by the cost model, and the MFU that they make."""
    hours = search.hours(scenario)
    gpu_seconds = hours * 3600 * scenario.world
    return {
        "hours": hours,
        "gpu_hours": hours * scenario.world,
        "mfu": total_flops / (gpu_seconds * scenario.gpu.flops),
    }


def _phase(phase: memory.Phase) -> PlannedPhase:
    return {
        "name": phase.name,
        "stage": phase.stage,
        "items": phase.items,
        "total": phase.total,
    }


def _candidates(scenario: Scenario) -> list[PlannedCandidate]:
    candidates: list[PlannedCandidate] = []
    for candidate in search.candidates(scenario):
        candidates.append(
            {
                "parallel": asdict(candidate.parallel),
                "recompute": candidate.recompute,
                "bytes": candidate.bytes,
                "hours": candidate.hours,
                "reason": candidate.reason,
            }
        )
    return candidates


def _span(scenario: Scenario, span: Span) -> PlannedSpan:
    seconds = cost.seconds(scenario, span)
    load = span.load
    return {
        "steps": span.steps,
        "mean_tokens": load.tokens,
        "attention_length": load.squares,
        "patches": load.patches,
        "told": load.basis,
        "limit": span.limit,
        "tokens": scenario.tokens(span),
        "micro_batches": scenario.micro_batches(span),
        "flops": cost.model_flops(scenario, span),
        "seconds": seconds.total,
        "parts": seconds.parts,
    }


def _sources(config: ColdStartConfig | RLConfig, spans: Sequence[PlannedSpan]) -> list[PlannedSource]:
    """Return rows and epochs of each finite source; a tokenised set counts as one source."""
    data = config.data
    if isinstance(config, RLConfig):
        # A prompt is drawn once, whatever the number of its responses.
        iterations = sum(span["steps"] for span in spans)
        samples = float(config.prompts * iterations)
    else:
        samples = sum(span["steps"] * span["tokens"] / span["mean_tokens"] for span in spans)
    if data.tokenised:
        _, rows = read_tokenised_workload(data.tokenised, data.pack_tokens)
        uses = [SourceUse(data.tokenised, round(rows), samples / rows)]
    else:
        uses = source_uses(data, samples)
    return [{"name": use.name, "rows": use.rows, "epochs": use.epochs} for use in uses]


def _ranks(scenario: Scenario) -> list[PlannedRank]:
    """Return the bytes that a rank of each pipeline stage has of each model."""
    config = scenario.config
    models = [("model", False, scenario)]
    if isinstance(config, RLConfig):
        models = [("policy", False, scenario)]
        if config.algorithm.has_critic:
            models.append(("critic", True, scenario.critic_scenario))
    ranks: list[PlannedRank] = []
    for name, critic, layout in models:
        parallel = layout.config.parallel
        for stage in range(parallel.pp):
            state = model_state(layout.shape, config.model, parallel, layout.dp, stage, critic=critic)
            ranks.append(
                {
                    "model": name,
                    "stage": stage,
                    "parameters": state.parameters,
                    "trained": state.trained,
                    "weights": state.weights,
                    "gradients": state.gradients,
                    "optimizer": state.optimizer,
                }
            )
    return ranks


def _engine(scenario: Scenario) -> PlannedEngine:
    config = scenario.config
    assert isinstance(config, RLConfig)
    rollout = config.rollout
    shape = scenario.shape
    dtype = config.model.dtype
    engine = memory.engine_memory(rollout, shape, scenario.gpu, dtype, config.offload)
    cache = engine["vLLM cache"]
    token_bytes = memory.cache_bytes_per_token(shape, rollout, dtype)
    longest = rollout.max_model_len
    if not longest:
        longest = max(stage.max_tokens for stage in config.curriculum)
    return {
        # Weights that leave no room make the cache's size negative.
        "cache_tokens": max(0, cache // token_bytes),
        "longest": longest,
        "engines": scenario.world // rollout.tp,
    }


def show(plan: Plan) -> str:
    """Return the plan as text."""
    model = plan["model"]
    gpu = plan["gpu"]
    parameters = model["parameters"]
    total = sum(parameters.values())
    part_counts = [f"{part} {count / 1e6:,.0f} M" for part, count in parameters.items() if count]
    counts = ", ".join(part_counts)
    gpu_gib = gpu["memory"] / _GIB
    layout = plan["layout"]
    parallel = ParallelConfig(**layout["parallel"])
    layout_name = search.name(parallel, layout["recompute"])
    lines = [
        f"model       {model['path']}: {total / 1e9:.3f} B parameters ({counts})",
        f"processes   {plan['world']} x {gpu['name']} ({gpu_gib:.1f} GiB), {plan['replicas']} replicas",
        f"layout      {layout_name}",
        "",
        f"{'a rank holds, GiB':20}{'parameters':>14}{'weights':>10}{'gradients':>11}{'optimizer':>11}",
    ]
    for rank in plan["rank"]:
        lines.append(_rank_line(rank))
    lines.append("")
    lines += _phase_lines(plan)
    lines.append("")
    lines += _work_lines(plan)
    if plan["candidates"] is not None:
        lines.append("")
        lines += _candidate_lines(plan["candidates"])
    return "\n".join(lines)


def _rank_line(rank: PlannedRank) -> str:
    """Return a line of the table of ranks, its columns as wide as those of the header in `show`."""
    title = f"{rank['model']}, stage {rank['stage']}"
    weights = rank["weights"] / _GIB
    gradients = rank["gradients"] / _GIB
    optimizer = rank["optimizer"] / _GIB
    sizes = f"{weights:10.2f}{gradients:11.2f}{optimizer:11.2f}"
    return f"  {title:18}{rank['parameters']:14,}{sizes}"


def _phase_lines(plan: Plan) -> list[str]:
    limit = plan["gpu"]["memory"]
    lines = ["memory of the fullest rank in each phase, GiB"]
    for phase in plan["phases"]:
        total = phase["total"]
        verdict = "fits" if total <= limit else f"DOES NOT FIT into {limit / _GIB:.1f}"
        lines.append(f"  {phase['name']:16}{total / _GIB:8.2f}  {verdict}")
        items = []
        for name, size in phase["items"].items():
            # An item that would print as 0.00 is left out.
            if size >= _GIB // 200:
                items.append(f"{name} {size / _GIB:.2f}")
        for start in range(0, len(items), _ITEMS_PER_LINE):
            line_items = items[start : start + _ITEMS_PER_LINE]
            lines.append(f"    {', '.join(line_items)}")
    patches = plan["patches_of_a_pack"]
    if patches["room"] is not None:  # else the tower stores nothing, and any number fits
        lines.append(f"  images: {patches['expected']:,} patches in a pack expected, room for {patches['room']:,}")
    if engine := plan["engine"]:
        cache_tokens = engine["cache_tokens"]
        longest = engine["longest"]
        sequences = cache_tokens / longest
        lines.append(
            f"  vLLM: {engine['engines']} engines, cache for {cache_tokens:,} tokens each = {sequences:.1f} "
            f"sequences of {longest:,}"
        )
    return lines


def _work_lines(plan: Plan) -> list[str]:
    lines = ["work"]
    for span in plan["spans"]:
        lines += _span_lines(span)
    sources = [SourceUse(**use) for use in plan["sources"]]
    lines += [f"  {line}" for line in show_uses(sources)]
    at_mfu = plan["at_mfu"]
    modelled = plan["by_cost_model"]
    checkpoints = plan["checkpoints_kept"]
    size = plan["checkpoint_bytes"]
    giga_tokens = plan["tokens"] / 1e9
    lines += [
        f"  {plan['steps']} steps, {giga_tokens:,.2f} G tokens, {plan['flops']:.3e} FLOP; bubble {plan['bubble']:.1%}",
        f"  at MFU {at_mfu['mfu']:.0%}: {at_mfu['hours']:,.1f} hours, {at_mfu['gpu_hours']:,.0f} GPU-hours",
        f"  by the cost model: {modelled['hours']:,.1f} hours, {modelled['gpu_hours']:,.0f} GPU-hours "
        f"(MFU {modelled['mfu']:.0%})",
        f"  a checkpoint: {size / 1e9:,.1f} GB; {checkpoints} kept: {size * checkpoints / 1e12:,.2f} TB",
        flops.FORMULA,
    ]
    return lines


def _span_lines(span: PlannedSpan) -> list[str]:
    seconds = []
    for name, value in span["parts"].items():
        # A part that would print as 0.0 is left out.
        if value >= 0.05:
            seconds.append(f"{name} {value:.1f}")
    mega_tokens = span["tokens"] / 1e6
    peta_flop = span["flops"] / 1e15
    packs = f"{span['micro_batches']} packs a replica"
    return [
        f"  {span['steps']} steps of {mega_tokens:,.1f} M tokens, {packs}; samples: {span['told']}",
        f"    {peta_flop:,.0f} PFLOP and {span['seconds']:.1f} s a step, in seconds:",
        f"    {', '.join(seconds)}",
    ]


def _candidate_lines(candidates: Sequence[PlannedCandidate]) -> list[str]:
    fitting: list[PlannedCandidate] = []
    reasons: Counter[str] = Counter()
    for candidate in candidates:
        if candidate["reason"]:
            kind = _kind_of_reason(candidate["reason"])
            reasons[kind] += 1
        else:
            fitting.append(candidate)
    lines = [
        f"layouts that fit: {len(fitting)} of {len(candidates)}, fastest first",
        "  hours     GiB",
    ]
    for candidate in fitting[:_SHOWN_LAYOUTS]:
        parallel = ParallelConfig(**candidate["parallel"])
        layout = search.name(parallel, candidate["recompute"])
        gib = candidate["bytes"] / _GIB
        lines.append(f"{candidate['hours']:7,.1f}{gib:8.1f}  {layout}")
    lines.append("layouts that cannot be")
    for reason, count in reasons.most_common(_SHOWN_REASONS):
        lines.append(f"{count:6}  {reason}")
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
    # Nothing says how many: one replica is the least that the layout runs on.
    return parallel.ranks


def dry_run(config: ColdStartConfig | RLConfig, name: str) -> int:
    """Print the plan of a run that is about to start, on its first process; no process group, no GPU.  Return 0."""
    # There is no process group to ask: torchrun sets the first variable, srun the second.
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    if rank == "0":
        options = Options(world=processes(name, config.parallel), search=False)
        print(show(plan(config, options)), flush=True)
    return 0
