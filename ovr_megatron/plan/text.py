"""A plan as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ovr_megatron.config import ParallelConfig
from ovr_megatron.data.repetition import SourceUse, show_uses
from ovr_megatron.plan import flops, search
from ovr_megatron.plan.plan_json import Plan, PlannedCandidate, PlannedRank, PlannedSimulation, PlannedSpan

_GIB = 1 << 30
_SHOWN_LAYOUTS = 10
_SHOWN_REASONS = 8
_ITEMS_PER_LINE = 5


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
    if plan["best_command"]:
        lines += [
            "",
            "the fastest (give run.dir and model.path, if they are not there)",
            f"  {plan['best_command']}",
        ]
    if plan["simulation"]:
        lines.append("")
        lines += _simulation_lines(plan["simulation"])
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
        # vLLM does not start with less room than for one sequence.
        verdict = "" if cache_tokens >= longest else "  DOES NOT FIT"
        lines.append(
            f"  vLLM: {engine['engines']} engines, cache for {cache_tokens:,} tokens each = {sequences:.1f} "
            f"sequences of {longest:,}{verdict}"
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
        layout = search.SearchedLayout(parallel, candidate["recompute"], candidate["rollout_tp"], candidate["offload"])
        gib = candidate["bytes"] / _GIB
        lines.append(f"{candidate['hours']:7,.1f}{gib:8.1f}  {search.describe(layout)}")
    lines.append("layouts that cannot be")
    for reason, count in reasons.most_common(_SHOWN_REASONS):
        lines.append(f"{count:6}  {reason}")
    return lines


def _simulation_lines(simulation: PlannedSimulation) -> list[str]:
    """Return the table of simulated ways of generating."""
    rates = simulation["rates"]
    responses = simulation["prompts"] * simulation["responses"]
    width = max(len(mode["name"]) for mode in simulation["modes"])
    lines = [
        f"simulated iterations of {simulation['prompts']:,} prompts, {responses:,} responses: {simulation['lengths']}",
        f"  an engine runs {simulation['slots']:,} at once; a step: {1000 * rates['step_s']:.2f} ms, and "
        f"{1e6 * rates['sequence_s']:.1f} us a response, {1e9 * rates['context_s']:.1f} ns a token of context",
        f"  {'':{width}}{'generate':>9}{'engines':>9}{'iteration':>10}{'GPUs':>7}{'stale':>7}{'again':>7}",
        f"  {'':{width}}{'s':>9}{'idle':>9}{'s':>10}{'idle':>7}{'tokens':>7}{'tokens':>7}{'gain':>7}",
    ]
    for mode in simulation["modes"]:
        lines.append(
            f"  {mode['name']:{width}}{mode['generate_s']:9.1f}{mode['engine_idle']:9.1%}{mode['iteration_s']:10.1f}"
            f"{mode['gpu_idle']:7.1%}{mode['stale']:7.1%}{mode['discarded']:7.1%}{mode['gain']:7.2f}"
        )
    return lines


def _kind_of_reason(reason: str) -> str:
    """Return the reason without its remedy; reasons that differ in the gigabytes alone become one."""
    if reason.startswith("out of memory"):
        return reason.split(" needs ")[0]
    return reason.partition(";")[0]
