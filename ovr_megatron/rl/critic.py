"""Build the critic, a model of any size that reads the policy's samples, and refuse one that cannot."""

from __future__ import annotations

from pathlib import Path

from ovr_megatron.checkpoint import store
from ovr_megatron.checkpoint.hf_assets import write_critic_assets
from ovr_megatron.config import RLConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.engine import Engine
from ovr_megatron.families import ModelShape
from ovr_megatron.rl.sample_readers import check_reads_samples
from ovr_megatron.runtime.distributed import World
from ovr_megatron.weights.folder import WeightFolder


def critic_folder(config: RLConfig, model_folder: Path) -> Path:
    """Return the folder of the critic's initial weights: that of ``critic.path``, or the policy's.

    Raises:
        CheckpointError: ``critic.path`` is a checkpoint without a critic.
    """
    if config.critic.path:
        return store.weights_of(config.critic.path, "critic")
    return model_folder


def build_critic(
    config: RLConfig,
    model_folder: Path,
    processor: Processor,
    world: World,
    policy: Engine | None = None,
) -> Engine:
    """Build the critic with the weights in ``critic.path``, or those of ``model_folder``, and a value head.

    A folder without a value head, as that of any model but a critic, gets a fresh one.

    Args:
        config: of the job.
        model_folder: the policy's.
        processor: likewise.
        world: the processes.
        policy: whose frozen weights are the critic's, too, where both have adapters and start from one folder in one
            layout; None: the critic has its own.

    Raises:
        CheckpointError: the checkpoint ``critic.path`` is damaged or has no critic.
        ConfigError: the critic cannot read the policy's samples.
    """
    settings = config.critic
    if settings.path:
        store.check_weights(settings.path, world, "critic")
    folder = critic_folder(config, model_folder)
    shape = ModelShape.from_hf(folder)
    if settings.path:
        check_reads_samples(f"critic.path={settings.path}", folder, shape, processor, config.longest_sequence)
    layout = settings.parallel or config.parallel  # without one of its own the policy's
    base = None
    if config.model.lora.rank and layout == config.parallel and folder.resolve() == model_folder.resolve():
        base = policy
        folder = model_folder  # it may be written in several ways
    critic = Engine(shape, config.model, layout, world, critic=True, base=base)
    total_steps = config.iterations * config.algorithm.critic_steps
    critic.with_optimizer(settings.optimizer, total_steps)
    critic.load(WeightFolder(folder), settings.head_init, seed=config.run.seed)
    return critic


def record_critic(config: RLConfig, processor: Processor) -> None:
    """Write the Hugging Face files of a critic of another size than the policy into the run folder."""
    if not config.algorithm.has_critic or not config.critic.path:
        return
    folder = critic_folder(config, processor.folder)
    if ModelShape.from_hf(folder) != processor.shape:
        write_critic_assets(Path(config.run.dir) / "companions", folder, processor)
