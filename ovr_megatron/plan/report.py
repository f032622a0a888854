"""The plan of a recipe, as data that is ready for JSON."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ovr_megatron.checkpoint.store import weights_of
from ovr_megatron.config import ColdStartConfig, ConfigError, ParallelConfig, RLConfig
from ovr_megatron.data.hub import is_hub_name
from ovr_megatron.data.repetition import SourceUse, source_uses
from ovr_megatron.families import ModelShape
from ovr_megatron.families.presets import presets, write_config
from ovr_megatron.plan import cost, memory, search
from ovr_megatron.plan.hardware import find_gpu, gpus_in_name
from ovr_megatron.plan.parameters import count_parameters, model_state
from ovr_megatron.plan.plan_json import (
    Plan,
    PlannedCandidate,
    PlannedEngine,
    PlannedPhase,
    PlannedRank,
    PlannedSource,
    PlannedSpan,
)
from ovr_megatron.plan.scenario import Scenario, Span, build_scenario
from ovr_megatron.plan.simulation import SimulationOptions, simulate
from ovr_megatron.plan.text import show
from ovr_megatron.plan.workload import read_tokenised_workload


@dataclass(frozen=True)
class Options:
    """Options beside the configuration.

    Attributes:
        world: processes, one a GPU.
        gpu: their kind, or memory in GiB.
        mfu: the MFU to reckon with.
        search: whether to search layouts.
        recipe: its name or path, for the command of the best layout.
        overrides: settings of the command line, which the search leaves as they are.
        simulation: what to simulate; None simulates nothing.
    """

    world: int
    gpu: str = "h100"
    mfu: float = 0.4
    search: bool = True
    recipe: str = "RECIPE"
    overrides: tuple[str, ...] = ()
    simulation: SimulationOptions | None = None


def read_critic_shape(config: ColdStartConfig | RLConfig) -> ModelShape | None:
    """Return the sizes of the critic in ``critic.path``; None where it starts from the policy, or there is none.

    Raises:
        ShapeError: as of `read_shape`.
        ConfigError: likewise.
    """
    if isinstance(config, ColdStartConfig) or not config.algorithm.has_critic or not config.critic.path:
        return None
    shape, _ = read_shape(config.critic.path, "critic.path", "critic")
    return shape


def read_shape(path: str, setting: str = "model.path", part: str = "policy") -> tuple[ModelShape, str | None]:
    """Read the sizes of the model that ``setting`` names as ``path`` and return them with its folder.

    The name of a preset (7B) has no folder.

    Args:
        path: a folder, a name on the hub, or a preset.
        setting: that has it, for messages.
        part: of a checkpoint.

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
    if not exists and not is_hub_name(path):
        names = ", ".join(known_presets)
        raise ConfigError(f"{setting}={path} is no folder; for a plan it can also be one of {names}")
    folder = weights_of(path, part)
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
    teacher_shape = None
    if isinstance(config, RLConfig) and config.algorithm.teacher:
        teacher_shape, _ = read_shape(config.algorithm.teacher, "algorithm.teacher")
    critic_shape = read_critic_shape(config)
    scenario = build_scenario(config, shape, gpu, options.world, folder, critic_shape, teacher_shape)
    phases = memory.phases(scenario)
    spans = [_span(scenario, span) for span in scenario.spans]
    steps = sum(span["steps"] for span in spans)
    total_flops = sum(span["steps"] * span["flops"] for span in spans)
    total_tokens = sum(span["steps"] * span["tokens"] for span in spans)
    first_span = scenario.spans[0]
    candidates: list[search.Candidate] | None = None
    if options.search:
        candidates = search.candidates(scenario, search.fixed_names(options.overrides))
    checkpoints = config.run.keep_last
    if not checkpoints:
        checkpoints = -(-steps // config.run.save_every)
    return {
        "model": {"path": config.model.path, "parameters": dict(count_parameters(shape))},
        "gpu": asdict(gpu),
        "world": scenario.world,
        "replicas": scenario.dp,
        "layout": {
            "parallel": asdict(config.parallel),
            "recompute": config.model.recompute,
        },
        "rank": _ranks(scenario),
        "phases": [_phase(phase) for phase in phases],
        "fits": all(phase.total <= gpu.memory for phase in phases) and not memory.cache_shortage(scenario),
        "patches_of_a_pack": {
            "expected": scenario.pack(first_span).patches,
            "room": memory.room_for_patches(scenario),
        },
        "engine": _engine(scenario) if isinstance(config, RLConfig) and config.generates else None,
        "spans": spans,
        "sources": _sources(scenario.config, spans) if folder else [],
        "tokens": total_tokens,
        "steps": steps,
        "flops": total_flops,
        "bubble": cost.bubble(scenario, first_span),
        "at_mfu": _time_at_mfu(scenario, total_flops, options.mfu),
        "by_cost_model": _modelled_time(scenario, total_flops),
        "checkpoint_bytes": memory.checkpoint_bytes(config, shape, critic_shape),
        "checkpoints_kept": checkpoints,
        "candidates": _candidates(candidates) if candidates else None,
        "best_command": _best_command(scenario, candidates, options) if candidates else None,
        "simulation": simulate(scenario, options.simulation) if options.simulation else None,
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


def _candidates(candidates: Sequence[search.Candidate]) -> list[PlannedCandidate]:
    planned: list[PlannedCandidate] = []
    for candidate in candidates:
        layout = candidate.layout
        planned.append(
            {
                "parallel": asdict(layout.parallel),
                "recompute": layout.recompute,
                "rollout_tp": layout.rollout_tp,
                "offload": layout.offload,
                "bytes": candidate.bytes,
                "hours": candidate.hours,
                "reason": candidate.reason,
            }
        )
    return planned


def _best_command(scenario: Scenario, candidates: Sequence[search.Candidate], options: Options) -> str | None:
    """Return the command that runs the fastest layout, or None where no layout fits."""
    best = candidates[0]
    if best.reason:
        return None
    return search.command_line(scenario, best.layout, options.recipe, options.overrides)


def _span(scenario: Scenario, span: Span) -> PlannedSpan:
    seconds = cost.seconds(scenario, span)
    load = span.load
    return {
        "steps": span.steps,
        "mean_tokens": load.tokens,
        "attention_length": load.attended_length,
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
        if teacher := scenario.teacher_scenario:
            models.append(("teacher", False, teacher))
    ranks: list[PlannedRank] = []
    for name, critic, layout in models:
        parallel = layout.config.parallel
        for stage in range(parallel.pp):
            state = model_state(layout.shape, layout.model, parallel, layout.dp, stage, critic=critic)
            if critic and isinstance(config, RLConfig) and config.critic_shares_base:
                state = state.without_frozen()
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
    return {
        # Weights that leave no room make the cache's size negative.
        "cache_tokens": max(0, cache // token_bytes),
        "longest": config.longest_sequence,
        "engines": scenario.engine_ranks // rollout.tp,
    }


def processes(name: str, parallel: ParallelConfig) -> int:
    """Return the processes of a run: the launcher's, or those in a recipe's name (``..._64gpu``), or one replica's."""
    for variable in ("WORLD_SIZE", "SLURM_NTASKS"):
        value = os.environ.get(variable, "")
        if value.isdigit() and int(value) > 1:
            return int(value)
    # Where nothing says how many, one replica is the least that the layout runs on.
    return gpus_in_name(name) or parallel.ranks


def dry_run(config: ColdStartConfig | RLConfig, name: str) -> int:
    """Print the plan of a run that is about to start, on its first process; no process group, no GPU.  Return 0."""
    # There is no process group to ask: torchrun sets the first variable, srun the second.
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    if rank == "0":
        options = Options(world=processes(name, config.parallel), search=False)
        print(show(plan(config, options)), flush=True)
    return 0
