"""Build the critic, a model of any size that reads the policy's samples, and refuse one that cannot."""

from __future__ import annotations

from pathlib import Path

from ovr_megatron.checkpoint import store
from ovr_megatron.checkpoint.hf_assets import write_critic_assets
from ovr_megatron.config import ConfigError, RLConfig
from ovr_megatron.data.hf_assets import load_assets
from ovr_megatron.data.processing import Processor
from ovr_megatron.engine import Engine
from ovr_megatron.families import ModelShape
from ovr_megatron.runtime.distributed import World
from ovr_megatron.weights.folder import WeightFolder

# The critic reads the policy's patches and positions, which depend on these sizes.
_VISION_SIZES = ("in_channels", "patch", "temporal_patch", "merge", "tokens_per_second")


def critic_folder(config: RLConfig, model_folder: Path) -> Path:
    """Return the folder of the critic's initial weights: that of ``critic.path``, or the policy's.

    Raises:
        CheckpointError: ``critic.path`` is a checkpoint without a critic.
    """
    if config.critic.path:
        return store.weights_of(config.critic.path, "critic")
    return model_folder


def build_critic(
    config: RLConfig, model_folder: Path, processor: Processor, world: World, policy: Engine | None = None
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
        check_critic(config, folder, shape, processor)
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


def check_critic(config: RLConfig, folder: Path, shape: ModelShape, processor: Processor) -> None:
    """Refuse a critic that would read other token ids, patches or positions than the policy, or too few of them.

    Args:
        config: of the job.
        folder: the critic's, with its tokenizer.
        shape: the critic's.
        processor: the policy's.

    Raises:
        AssetError: the folder has no tokenizer that can be loaded.
        ConfigError: names what differs.
    """
    policy = processor.shape
    setting = f"critic.path={config.critic.path}"
    if shape.family != policy.family:
        raise ConfigError(f"{setting} is a model of family {shape.family}, and the policy's is {policy.family}")
    for name in _VISION_SIZES:
        own_size, expected = (getattr(vision, name, None) for vision in (shape.vision, policy.vision))
        if own_size != expected:
            raise ConfigError(
                f"{setting} has {name}={own_size} in its vision tower, and the policy {expected}: it cannot read the "
                "policy's images; give a model of the same series"
            )
    # Equal tokenizers have equal ids of images and videos: each folder is checked against its own.
    own = load_assets(folder, shape).tokenizer.get_vocab()
    policys = processor.tokenizer.get_vocab()
    differing = sorted(token for token in own.keys() | policys.keys() if own.get(token) != policys.get(token))
    if differing:
        token = differing[0]
        raise ConfigError(
            f"{setting} has another tokenizer than the policy: {len(differing)} tokens differ, {token!r} has the id "
            f"{own.get(token)} there and {policys.get(token)} here; give a model with the policy's tokenizer"
        )
    shape.check_length(config.longest_sequence, f"{setting} with the longest prompt and response")


def record_critic(config: RLConfig, processor: Processor) -> None:
    """Write the Hugging Face files of a critic of another size than the policy into the run folder."""
    if not config.algorithm.has_critic or not config.critic.path:
        return
    folder = critic_folder(config, processor.folder)
    if ModelShape.from_hf(folder) != processor.shape:
        write_critic_assets(Path(config.run.dir) / "companions", folder, processor)
