"""The plan of a recipe, as data and as text."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ovr_megatron.checkpoint.store import weights_of
from ovr_megatron.config import ColdStartConfig, ConfigError, ParallelConfig, RLConfig
from ovr_megatron.data.repetition import SourceUse, show_uses, source_uses
from ovr_megatron.model.presets import PRESETS, write_config
from ovr_megatron.model.shape import ModelShape
from ovr_megatron.plan import cost, flops, memory, search
from ovr_megatron.plan.hardware import find_gpu
from ovr_megatron.plan.parameters import count_parameters, model_state
from ovr_megatron.plan.setting import Setting, setting
from ovr_megatron.plan.workload import of_tokenised

_GIB = 1 << 30
_SHOWN, _REASONS = 10, 8


@dataclass(frozen=True)
class Options:
    """What the recipe does not say: GPUs and their kind, the MFU to reckon with, whether to look for layouts."""

    world: int
    gpu: str = "h100"
    mfu: float = 0.4
    search: bool = True


def read_shape(path: str) -> tuple[ModelShape, str | None]:
    """Sizes of a model and its folder; for the name of a preset (7B) there is no folder.

    Raises:
        ShapeError: the folder holds no Qwen2.5-VL.
        ConfigError: neither a folder nor a preset.
    """
    if path in PRESETS and not Path(path).exists():
        with TemporaryDirectory() as folder:
            return ModelShape.from_hf(write_config(path, folder).parent), None
    if not Path(path).exists():
        raise ConfigError(f"model.path={path} is no folder; for a plan it can also be one of {', '.join(PRESETS)}")
    found = weights_of(path)
    return ModelShape.from_hf(found), str(found)


def plan(config: ColdStartConfig | RLConfig, options: Options) -> dict[str, Any]:
    """Everything that the plan knows, ready for JSON; bytes, seconds and FLOP.

    Raises:
        ConfigError: a setting that cannot work, as a run would refuse it.
        RowError: a row of the data's sample cannot be used.
    """
    if not 0 < options.mfu <= 1:
        raise ConfigError(f"--mfu {options.mfu} must lie between 0 and 1")
    shape, folder = read_shape(config.model.path)
    work = setting(config, shape, find_gpu(options.gpu), options.world, folder)
    phases = memory.phases(work)
    spans = [_span(work, span) for span in work.spans]
    total_flops = sum(span["steps"] * span["flops"] for span in spans)
    stated = total_flops / (options.mfu * work.world * work.gpu.flops) / 3600
    modelled = search.hours(work)
    return {
        "model": {"path": config.model.path, "parameters": count_parameters(shape)},
        "gpu": asdict(work.gpu),
        "world": work.world,
        "replicas": work.dp,
        "layout": {"parallel": asdict(config.parallel), "recompute": config.model.recompute},
        "rank": _ranks(work),
        "phases": [{"name": p.name, "stage": p.stage, "items": p.items, "total": p.total} for p in phases],
        "fits": all(phase.total <= work.gpu.memory for phase in phases),
        "patches_of_a_pack": {"expected": work.pack(work.spans[0]).patches, "room": memory.room_for_patches(work)},
        "engine": _engine(work) if isinstance(config, RLConfig) else None,
        "spans": spans,
        "sources": _sources(config, spans) if folder else [],
        "tokens": sum(span["steps"] * span["tokens"] for span in spans),
        "steps": sum(span["steps"] for span in spans),
        "flops": total_flops,
        "bubble": cost.bubble(work, work.spans[0]),
        "at_mfu": {"mfu": options.mfu, "hours": stated, "gpu_hours": stated * work.world},
        "by_cost_model": {
            "hours": modelled,
            "gpu_hours": modelled * work.world,
            "mfu": total_flops / (modelled * 3600 * work.world * work.gpu.flops),
        },
        "checkpoint_bytes": memory.checkpoint_bytes(work),
        "checkpoints_kept": config.run.keep_last or -(-sum(span["steps"] for span in spans) // config.run.save_every),
        "candidates": [asdict(c) for c in search.candidates(work)] if options.search else None,
    }


def _span(work: Setting, span: Any) -> dict[str, Any]:
    found = cost.seconds(work, span)
    return {
        "steps": span.steps,
        "mean_tokens": span.load.tokens,
        "attention_length": span.load.squares,
        "patches": span.load.patches,
        "told": span.load.told,
        "limit": span.limit,
        "tokens": work.tokens(span),
        "micro_batches": work.micro_batches(span),
        "flops": cost.model_flops(work, span),
        "seconds": found.total,
        "parts": found.parts,
    }


def _sources(config: ColdStartConfig | RLConfig, spans: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows and epochs of each finite source; those of a tokenised set together."""
    if isinstance(config, RLConfig):
        samples = float(config.prompts * sum(span["steps"] for span in spans))
    else:
        samples = sum(span["steps"] * span["tokens"] / span["mean_tokens"] for span in spans)
    if config.data.tokenised:
        rows = of_tokenised(config.data.tokenised, config.data.pack_tokens)[1]
        return [asdict(SourceUse(config.data.tokenised, round(rows), samples / rows))]
    return [asdict(use) for use in source_uses(config.data, samples)]


def _ranks(work: Setting) -> list[dict[str, Any]]:
    config = work.config
    kinds = [("model", False, work)]
    if isinstance(config, RLConfig):
        kinds = [("policy", False, work)]
        kinds += [("critic", True, work.of_critic)] if config.algorithm.has_critic else []
    return [
        {"model": name, "stage": stage}
        | asdict(model_state(at.shape, config.model, at.config.parallel, at.dp, stage, critic=critic))
        for name, critic, at in kinds
        for stage in range(at.config.parallel.pp)
    ]


def _engine(work: Setting) -> dict[str, Any]:
    config = work.config
    assert isinstance(config, RLConfig)
    engine = memory.engine_memory(config.rollout, work.shape, work.gpu, config.model.dtype, config.offload)
    cache = engine["vLLM cache"]
    each = memory.cache_bytes_per_token(work.shape, config.rollout, config.model.dtype)
    longest = config.rollout.max_model_len or max(stage.max_tokens for stage in config.curriculum)
    return {"cache_tokens": max(0, cache // each), "longest": longest, "engines": work.world // config.rollout.tp}


def show(found: dict[str, Any]) -> str:
    """The plan as text."""
    gib, gpu = _GIB, found["gpu"]
    parameters = found["model"]["parameters"]
    counts = ", ".join(f"{part} {number / 1e6:,.0f} M" for part, number in parameters.items() if number)
    parallel = ParallelConfig(**found["layout"]["parallel"])
    lines = [
        f"model       {found['model']['path']}: {sum(parameters.values()) / 1e9:.3f} B parameters ({counts})",
        f"processes   {found['world']} x {gpu['name']} ({gpu['memory'] / gib:.1f} GiB), {found['replicas']} replicas",
        f"layout      {search.name(parallel, found['layout']['recompute'])}",
        "",
        f"{'a rank holds, GiB':20}{'parameters':>14}{'weights':>10}{'gradients':>11}{'optimizer':>11}",
    ]
    for rank in found["rank"]:
        sizes = "".join(f"{rank[k] / gib:{w}.2f}" for k, w in (("weights", 10), ("gradients", 11), ("optimizer", 11)))
        lines.append(f"  {rank['model'] + ', stage ' + str(rank['stage']):18}{rank['parameters']:14,}{sizes}")
    lines += ["", *_phase_lines(found), "", *_work_lines(found)]
    if found["candidates"] is not None:
        lines += ["", *_candidate_lines(found)]
    return "\n".join(lines)


def _phase_lines(found: dict[str, Any]) -> list[str]:
    gib, limit = _GIB, found["gpu"]["memory"]
    lines = ["memory of the fullest rank in each phase, GiB"]
    for phase in found["phases"]:
        verdict = "fits" if phase["total"] <= limit else f"DOES NOT FIT into {limit / gib:.1f}"
        lines.append(f"  {phase['name']:16}{phase['total'] / gib:8.2f}  {verdict}")
        items = [f"{name} {size / gib:.2f}" for name, size in phase["items"].items() if size >= gib // 200]
        lines += [f"    {', '.join(items[start : start + 5])}" for start in range(0, len(items), 5)]
    patches = found["patches_of_a_pack"]
    if patches["room"] is not None:
        lines.append(f"  images: {patches['expected']:,} patches in a pack expected, room for {patches['room']:,}")
    if engine := found["engine"]:
        full = engine["cache_tokens"] / engine["longest"]
        lines.append(
            f"  vLLM: {engine['engines']} engines, cache for {engine['cache_tokens']:,} tokens each = {full:.1f} "
            f"sequences of {engine['longest']:,}"
        )
    return lines


def _work_lines(found: dict[str, Any]) -> list[str]:
    lines = ["work"]
    for span in found["spans"]:
        packs = f"{span['micro_batches']} packs a replica"
        lines.append(
            f"  {span['steps']} steps of {span['tokens'] / 1e6:,.1f} M tokens, {packs}; samples: {span['told']}"
        )
        lines.append(f"    {span['flops'] / 1e15:,.0f} PFLOP and {span['seconds']:.1f} s a step, in seconds:")
        lines.append(
            "    " + ", ".join(f"{name} {value:.1f}" for name, value in span["parts"].items() if value >= 0.05)
        )
    lines += [f"  {line}" for line in show_uses([SourceUse(**use) for use in found["sources"]])]
    at, by = found["at_mfu"], found["by_cost_model"]
    return [
        *lines,
        f"  {found['steps']} steps, {found['tokens'] / 1e9:,.2f} G tokens, {found['flops']:.3e} FLOP; bubble "
        f"{found['bubble']:.1%}",
        f"  at MFU {at['mfu']:.0%}: {at['hours']:,.1f} hours, {at['gpu_hours']:,.0f} GPU-hours",
        f"  by the cost model: {by['hours']:,.1f} hours, {by['gpu_hours']:,.0f} GPU-hours (MFU {by['mfu']:.0%})",
        f"  a checkpoint: {found['checkpoint_bytes'] / 1e9:,.1f} GB; {found['checkpoints_kept']} kept: "
        f"{found['checkpoint_bytes'] * found['checkpoints_kept'] / 1e12:,.2f} TB",
        flops.FORMULA,
    ]


def _candidate_lines(found: dict[str, Any]) -> list[str]:
    fitting = [c for c in found["candidates"] if not c["reason"]]
    others = Counter(_kind(c["reason"]) for c in found["candidates"] if c["reason"])
    lines = [f"layouts that fit: {len(fitting)} of {len(found['candidates'])}, fastest first", "  hours     GiB"]
    for c in fitting[:_SHOWN]:
        layout = search.name(ParallelConfig(**c["parallel"]), c["recompute"])
        lines.append(f"{c['hours']:7,.1f}{c['bytes'] / _GIB:8.1f}  {layout}")
    lines.append("layouts that cannot be")
    lines += [f"{count:6}  {reason}" for reason, count in others.most_common(_REASONS)]
    return lines


def _kind(reason: str) -> str:
    """The reason without its remedy; those that differ in the gigabytes alone are one."""
    return reason.split(" needs ")[0] if reason.startswith("out of memory") else reason.partition(";")[0]


def processes(name: str, parallel: ParallelConfig) -> int:
    """Processes of a run: the launcher's, or what a recipe's name says (``..._64gpu``), or one replica's."""
    for variable in ("WORLD_SIZE", "SLURM_NTASKS"):
        if os.environ.get(variable, "").isdigit() and int(os.environ[variable]) > 1:
            return int(os.environ[variable])
    said = [part.removesuffix("gpu") for part in name.split("_") if part.endswith("gpu")]
    return int(said[0]) if said and said[0].isdigit() else parallel.ranks


def dry_run(config: ColdStartConfig | RLConfig, name: str) -> int:
    """Print the plan of a run that is about to start, on its first process; no process group, no GPU.  Return 0."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(show(plan(config, Options(world=processes(name, config.parallel), search=False))), flush=True)
    return 0
