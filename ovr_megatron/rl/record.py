"""Record the start of reinforcement learning, and print its heading."""

from __future__ import annotations

from pathlib import Path

from ovr_megatron.checkpoint.hf_assets import write_hf_assets
from ovr_megatron.checkpoint.resume import ResumePoint
from ovr_megatron.config import AlgorithmConfig, RLConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.engine import Engine
from ovr_megatron.model.layers import cautions, layers_in_use
from ovr_megatron.plan.heading import run_rows, show_heading, source_rows
from ovr_megatron.ppo.curriculum import stage_starts
from ovr_megatron.rl.critic import record_critic
from ovr_megatron.runtime import run_folder
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.logs import get_logger
from ovr_megatron.runtime.runlog import record_layers
from ovr_megatron.runtime.starts import LaunchArgs, record_start

logger = get_logger(__name__)


def record_run(config: RLConfig, processor: Processor, world: World, launch: LaunchArgs | None) -> None:
    """Write settings, layers, the start and the Hugging Face files of the model into the run folder."""
    run = Path(config.run.dir)
    run_folder.record(config, run)
    layers = layers_in_use(config.model)
    record_layers(run, layers, cautions(config.model, rollout=True))
    if launch:
        record_start(run, launch, world.job.size if world.job else world.size)
    write_hf_assets(run / "companions", processor)
    record_critic(config, processor)


def show_start(config: RLConfig, engines: dict[str, Engine], world: World, checkpoint: ResumePoint | None) -> None:
    """Print the heading of the run: batch, curriculum, algorithm, data, models, and the checkpoint it goes on from."""
    algorithm = config.algorithm
    total_prompts = float(config.iterations * config.prompts)
    resumed = None
    if checkpoint:
        resumed = (checkpoint.path, checkpoint.step)
    rows = [
        ("batch", f"{config.prompts} prompts x {config.responses} responses an iteration"),
        ("tokens", f"of prompt and response at most: {describe_curriculum(config)}"),
        ("algorithm", f"{algorithm.estimator}, policy_updates={algorithm.policy_updates}"),
        *_teacher_rows(algorithm),
        *source_rows(config, total_prompts),
        *run_rows(config, engines, world, resumed),
        ("rollouts", describe_rollouts(config, world)),
    ]
    logger.info(show_heading(f"reinforcement learning in {config.run.dir}", rows))


def describe_rollouts(config: RLConfig, world: World) -> str:
    """Return where the rollouts come from: engines, or the archive of another run."""
    if config.learns_from_archive:
        return f"those of {config.rollouts_from}, no engine"
    engines_on = f"the last {world.job.generators} ranks" if world.job else "all ranks"
    replicas = (config.rollout.ranks or world.size) // config.rollout.tp
    return f"{replicas} vLLM engines, tp={config.rollout.tp}, on {engines_on}"


def _teacher_rows(algorithm: AlgorithmConfig) -> list[tuple[str, str]]:
    """Return the row of the teacher, if there is one."""
    if not algorithm.teacher:
        return []
    alone = "" if algorithm.learns_from_rewards else ", without rewards"
    return [("teacher", f"{algorithm.teacher}, coefficient {algorithm.teacher_coefficient:g}{alone}")]


def describe_curriculum(config: RLConfig) -> str:
    """Return the length limit of each stage that the run comes to, and where it begins."""
    limits = []
    for first_iteration, stage in zip(stage_starts(config.curriculum), config.curriculum, strict=True):
        if first_iteration < config.iterations:
            limits.append(f"{stage.max_tokens:,} from iteration {first_iteration}")
    return ", ".join(limits)
