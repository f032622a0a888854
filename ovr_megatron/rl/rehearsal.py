"""Rehearse a run: one iteration of responses of full length at each stage of the curriculum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NotRequired, TypedDict

from ovr_megatron.config import RLConfig
from ovr_megatron.data.skipped import skipped_rows
from ovr_megatron.ppo.curriculum import stage_starts
from ovr_megatron.ppo.experience import Models
from ovr_megatron.ppo.iteration import IterationResult, iterate
from ovr_megatron.ppo.prompts import PromptStream
from ovr_megatron.ppo.split_iteration import iterate_split
from ovr_megatron.rl.serving import serve
from ovr_megatron.rl.setup import build_models, build_rollouts, check_parts, check_steps, open_model_and_prompts
from ovr_megatron.rl.split import join_generators
from ovr_megatron.runtime import run_folder
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.files import write_json
from ovr_megatron.runtime.logs import get_logger
from ovr_megatron.runtime.steps import memory_peaks, peak_gib
from ovr_megatron.runtime.stop import StopRequest, StopRequested

logger = get_logger(__name__)


class RehearsedStage(TypedDict):
    """An entry of ``rehearsal.json``: one iteration at the length limit of a stage of the curriculum.

    Attributes:
        max_tokens: most tokens of a prompt and its response together.
        prompts: of the iteration.
        peak_gib: largest of all ranks that train.
        rollout_peak_gib: largest of all ranks that only generate; absent without such.
        length: mean tokens of a response.
        seconds: by phase.
    """

    max_tokens: int
    prompts: int
    peak_gib: float
    rollout_peak_gib: NotRequired[float]
    length: float
    seconds: dict[str, float]


def rehearse(config: RLConfig, world: World) -> Path:
    """Run one iteration of responses of full length at each stage of the curriculum, and measure it.  A collective.

    It takes as many prompts as fill all engines, at most those of an iteration, writes seconds and peak memory of each
    stage to ``rehearsal.json`` and keeps no weights.
    """
    run = Path(config.run.dir)
    prompt_count = min(config.prompts, rehearsal_prompts(config, world))
    # All responses have full length: there is no tail to leave to a later round, and stages do not follow one another.
    rollout_config = replace(config.rollout, oversample=0.0, max_staleness=0, extra_responses=0)
    config = replace(config, prompts=prompt_count, rollout=rollout_config)
    if world.job and world.job.generates:
        serve(config, world)
        return run
    with ExitStack() as resources:
        if world.job:
            resources.push(world.job.announce)
        return _rehearse(config, world, run, resources)


def _rehearse(config: RLConfig, world: World, run: Path, resources: ExitStack) -> Path:
    """Rehearse on this rank, which trains; what begins ends with ``resources``.  A collective."""
    run_folder.enter(run, run_folder.REHEARSAL, world.is_main)
    check_steps(config, world)
    check_parts(config, world.size)
    skipped = skipped_rows(config.data, run, world.is_main)
    model_folder, prompts = open_model_and_prompts(config, skipped)
    models, _ = build_models(config, model_folder, prompts.processor, world)
    # vLLM takes the memory that they leave free.
    models.offload_except(None)
    rehearse_iteration = _begin(config, world, models, prompts, model_folder, resources)
    measurements: list[RehearsedStage] = []
    stages = zip(stage_starts(config.curriculum), config.curriculum, strict=True)
    for first_iteration, stage in stages:
        if first_iteration >= config.iterations:
            break  # the run ends before this stage
        memory_peaks()  # on a GPU they begin anew
        try:
            metrics = rehearse_iteration(first_iteration).metrics
        except StopRequested:  # a signal to ranks that only generate
            break
        measurement: RehearsedStage = {
            "max_tokens": stage.max_tokens,
            "prompts": config.prompts,
            "peak_gib": peak_gib(),
            "length": metrics["response/length"],
            "seconds": phase_seconds(metrics),
        }
        if world.job:
            measurement["rollout_peak_gib"] = metrics["memory/rollout_peak_gib"]
        measurements.append(measurement)
        if world.is_main:
            logger.info(describe(measurement))
    path = run / "rehearsal.json"
    if world.is_main:
        run.mkdir(parents=True, exist_ok=True)
        write_json(path, measurements, indent=1)
    return path


def _begin(
    config: RLConfig,
    world: World,
    models: Models,
    prompts: PromptStream,
    model_folder: Path,
    resources: ExitStack,
) -> Callable[[int], IterationResult]:
    """Start engines and graders, or bring the weights to the ranks that have them; return what runs an iteration."""
    if world.job:
        stop = StopRequest()
        resources.callback(stop.close)
        resources.enter_context(world.job.reporting(stop))
        generators = join_generators(config, world.job, stop, config.iterations, lambda: 0, resources)
        generators.update(models, 0)
        return lambda iteration: iterate_split(models, generators, prompts, iteration, goes_on=False)
    rollouts = build_rollouts(config, model_folder, prompts.processor, models)
    # The longest responses that the limit allows take the most time and memory, which is what is measured.
    rollouts.endless = True
    resources.enter_context(rollouts.grader)
    return lambda iteration: iterate(models, rollouts, prompts, iteration)


def rehearsal_prompts(config: RLConfig, world: World) -> int:
    """Return how many prompts fill all engines and give every rank responses for every optimizer step."""
    trainers = world.job.trainers if world.job else world.size
    replicas = (config.rollout.ranks or trainers) // config.rollout.tp
    responses_to_fill = config.rollout.max_num_seqs * replicas
    prompts_to_fill = -(-responses_to_fill // config.responses)  # rounded up
    prompts_for_steps = trainers * config.algorithm.most_steps
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
