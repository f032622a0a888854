"""Rehearse a run: one iteration of responses of full length at each stage of the curriculum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from ovr_megatron.config import RLConfig
from ovr_megatron.data.skipped import skipped_rows
from ovr_megatron.ppo.curriculum import stage_starts
from ovr_megatron.ppo.iteration import iterate
from ovr_megatron.rl.setup import build_models, build_rollouts, check_steps, open_model_and_prompts
from ovr_megatron.runtime import run_folder
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.files import write_json
from ovr_megatron.runtime.logs import get_logger
from ovr_megatron.runtime.steps import memory_peaks, peak_gib

logger = get_logger(__name__)


class RehearsedStage(TypedDict):
    """An entry of ``rehearsal.json``: one iteration at the length limit of a stage of the curriculum.

    Attributes:
        max_tokens: most tokens of a prompt and its response together.
        prompts: of the iteration.
        length: mean tokens of a response.
        seconds: by phase.
    """

    max_tokens: int
    prompts: int
    peak_gib: float
    length: float
    seconds: dict[str, float]


def rehearse(config: RLConfig, world: World) -> Path:
    """Run one iteration of responses of full length at each stage of the curriculum, and measure it.  A collective.

    It takes as many prompts as fill all engines, at most those of an iteration, writes seconds and peak memory of each
    stage to ``rehearsal.json`` and keeps no weights.
    """
    run = Path(config.run.dir)
    run_folder.enter(run, run_folder.REHEARSAL, world.is_main)
    prompt_count = min(config.prompts, rehearsal_prompts(config, world))
    # All responses have full length: there is no tail to leave to a later round.
    rollout_config = replace(config.rollout, oversample=0.0, max_staleness=0, extra_responses=0)
    config = replace(config, prompts=prompt_count, rollout=rollout_config)
    check_steps(config, world)
    skipped = skipped_rows(config.data, run, world.is_main)
    model_folder, prompts = open_model_and_prompts(config, skipped)
    processor = prompts.processor
    models, _ = build_models(config, model_folder, processor, world)
    # vLLM takes the memory that they leave free.
    models.offload_except(None)
    rollouts = build_rollouts(config, model_folder, processor, models)
    # The longest responses that the limit allows take the most time and memory, which is what is measured.
    rollouts.endless = True
    measurements: list[RehearsedStage] = []
    with rollouts.grader:
        stages = zip(stage_starts(config.curriculum), config.curriculum, strict=True)
        for first_iteration, stage in stages:
            if first_iteration >= config.iterations:
                break  # the run ends before this stage
            memory_peaks()  # on a GPU they begin anew
            metrics = iterate(models, rollouts, prompts, first_iteration).metrics
            measurement: RehearsedStage = {
                "max_tokens": stage.max_tokens,
                "prompts": config.prompts,
                "peak_gib": peak_gib(),
                "length": metrics["response/length"],
                "seconds": phase_seconds(metrics),
            }
            measurements.append(measurement)
            if world.is_main:
                logger.info(describe(measurement))
    path = run / "rehearsal.json"
    if world.is_main:
        run.mkdir(parents=True, exist_ok=True)
        write_json(path, measurements, indent=1)
    return path


def rehearsal_prompts(config: RLConfig, world: World) -> int:
    """Return how many prompts fill all engines and give every rank responses for every optimizer step."""
    replicas = world.size // config.rollout.tp
    responses_to_fill = config.rollout.max_num_seqs * replicas
    prompts_to_fill = -(-responses_to_fill // config.responses)  # rounded up
    prompts_for_steps = world.size * config.algorithm.most_steps
    return max(prompts_to_fill, prompts_for_steps)


def phase_seconds(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the ``timing/`` metrics of an iteration by phase."""
    seconds = {}
    for key, value in metrics.items():
        if key.startswith("timing/"):
            seconds[key.removeprefix("timing/")] = value
    return seconds


def describe(measurement: RehearsedStage) -> str:
    """Return peak memory and seconds of a rehearsed stage as a line to read."""
    tokens = measurement["max_tokens"]
    peak = measurement["peak_gib"]
    phases = []
    for name, seconds in measurement["seconds"].items():
        phases.append(f"{name} {seconds:.1f}")
    phase_list = ", ".join(phases)
    return f"{tokens:,} tokens: {peak:.2f} GiB at most; seconds: {phase_list}"
