"""Build the teacher of on-policy distillation, and refuse one that reads prompts in another way than the policy."""

from __future__ import annotations

from ovr_megatron.checkpoint import store
from ovr_megatron.config import RLConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.engine import Engine
from ovr_megatron.families import ModelShape
from ovr_megatron.rl.sample_readers import check_reads_samples
from ovr_megatron.rollout.sampling import banned_tokens
from ovr_megatron.runtime.distributed import World
from ovr_megatron.weights.folder import WeightFolder


def build_teacher(config: RLConfig, processor: Processor, world: World) -> Engine | None:
    """Build the frozen model in ``algorithm.teacher``, of its own size and layout; None without one.  A collective.

    It scores the distribution that responses are sampled from: the same banned ids and temperature.

    Raises:
        CheckpointError: the folder is a damaged checkpoint, or one without a policy.
        ConfigError: it reads prompts in another way than the policy, or its layout does not fit.
    """
    algorithm = config.algorithm
    if not algorithm.teacher:
        return None
    store.check_weights(algorithm.teacher, world)
    folder = store.weights_of(algorithm.teacher)
    shape = ModelShape.from_hf(folder)
    setting = f"algorithm.teacher={algorithm.teacher}"
    check_reads_samples(setting, folder, shape, processor, config.longest_sequence, same_template=True)
    teacher = Engine(shape, config.model.frozen(), algorithm.teacher_parallel or config.parallel, world)
    teacher.load(WeightFolder(folder))
    # Its head may have other rows beyond the tokenizer's last id.
    teacher.sample_from(banned_tokens(shape, processor.tokenizer), config.rollout.temperature)
    return teacher
