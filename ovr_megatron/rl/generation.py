"""Only roll out: generate with the weights of the model, grade, and archive; no model trains."""

from __future__ import annotations

from pathlib import Path

from ovr_megatron.checkpoint import store
from ovr_megatron.config import RLConfig
from ovr_megatron.data.skipped import skipped_rows
from ovr_megatron.ppo import archive
from ovr_megatron.ppo.archive import ArchiveError
from ovr_megatron.ppo.curriculum import max_tokens
from ovr_megatron.ppo.iteration import response_metrics
from ovr_megatron.ppo.prompts import PromptStream
from ovr_megatron.ppo.rollouts import Rollout, Rollouts
from ovr_megatron.rl.setup import build_models, build_rollouts, open_model_and_prompts
from ovr_megatron.runtime import run_folder
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.logs import set_step
from ovr_megatron.runtime.progress import Progress


def generate(config: RLConfig, world: World) -> Path:
    """Only roll out, ``iterations`` times with the weights of ``model.path``, and archive it.  A collective.

    A run folder that has some iterations already goes on after the last complete one.

    Raises:
        ArchiveError: the disk is full, or an earlier iteration is damaged.
    """
    run = Path(config.run.dir)
    run_folder.enter(run, run_folder.ROLLOUTS, world.is_main)
    skipped = skipped_rows(config.data, run, world.is_main)
    model_folder, prompts = open_model_and_prompts(config, skipped)
    processor = prompts.processor
    store.check_weights(config.model.path, world)
    models, _ = build_models(config, model_folder, processor, world, training=False)
    rollouts = build_rollouts(config, model_folder, processor, models)
    archived = archive.iterations(run)
    first = 0
    if archived:
        # Prompts of complete iterations count as drawn: those that follow are the ones of an uninterrupted run.
        last = archived[-1]
        archive.skip(run, last, prompts)
        first = last + 1
    if world.is_main:
        run_folder.record(config, run)
    with (
        rollouts.grader,
        Progress(config.iterations, run.name, "iteration", world.is_main, first) as progress,
    ):
        for iteration in range(first, config.iterations):
            set_step(iteration)
            rollout = _generate_iteration(rollouts, prompts, run, iteration)
            metrics = response_metrics(rollout)
            reward = metrics["reward/mean"]
            progress.update(reward=f"{reward:.3f}")
    return run / "rollouts"


def _generate_iteration(rollouts: Rollouts, prompts: PromptStream, run: Path, iteration: int) -> Rollout:
    """Generate one iteration and archive it.  A collective.

    Raises:
        ArchiveError: the disk is full.
    """
    # Before the draw: from here ``only=train`` draws the prompts again.
    stream_state = prompts.state()
    limit = max_tokens(rollouts.config.curriculum, iteration)
    rollout = rollouts.collect(prompts, iteration, limit)
    # Not exchanged: no rank trains on them, and each writes what its own engine has generated.
    responses = [r for r in rollout.responses if r.prompt in rollout.train_prompts]
    problem = archive.write(run, iteration, rollout, stream_state, responses, {}, rollouts.world)
    if problem:
        raise ArchiveError(
            f"the rollouts of iteration {iteration} could not be written: {problem}. Those of {iteration} "
            f"iterations before it are whole: make room in {run}, then start the same command again"
        )
    return rollout
