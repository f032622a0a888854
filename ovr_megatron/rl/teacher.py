"""Build the teacher of on-policy distillation, and refuse one that reads prompts in another way than the policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image

from ovr_megatron.checkpoint import store
from ovr_megatron.config import ConfigError, DataConfig, RLConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.schema import ImagePart, Message, Row, TextPart
from ovr_megatron.engine import Engine
from ovr_megatron.families import ModelShape
from ovr_megatron.rollout.sampling import banned_tokens
from ovr_megatron.runtime.distributed import World
from ovr_megatron.weights.folder import WeightFolder

_QUESTION = "How many squares are blue? 3 + 4 = 7."
_WIDTH, _HEIGHT = 84, 56  # not square, so that a change of the sides shows
_ARRAYS = {"tokens": "token ids", "grid_thw": "patches of the image", "patches": "pixels", "position_ids": "positions"}


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
    check_teacher(folder, processor)
    shape.check_length(config.longest_sequence, "the longest prompt and response with algorithm.teacher")
    teacher = Engine(shape, config.model.frozen(), algorithm.teacher_parallel or config.parallel, world)
    teacher.load(WeightFolder(folder))
    # Its head may have other rows beyond the tokenizer's last id.
    teacher.sample_from(banned_tokens(shape, processor.tokenizer), config.rollout.temperature)
    return teacher


def check_teacher(folder: Path, processor: Processor) -> None:
    """Refuse a teacher for which the policy's token ids and patches mean something else.

    Both processors encode one fixed prompt with an image, and their vocabularies are compared.

    Args:
        folder: the teacher's, with tokenizer, processor and template.
        processor: the policy's.

    Raises:
        AssetError: the teacher's folder lacks tokenizer, processor or template.
        ConfigError: names both folders and what differs.
    """
    config = replace(processor.config, max_prompt_tokens=DataConfig().max_prompt_tokens, max_images=1)
    policy = Processor(processor.folder, config)
    teacher = Processor(folder, config)
    differing = ""
    if teacher.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        differing = "vocabularies"
    else:
        (policy_sample,) = policy.encode([_fixed_row()], generation=True)
        (teacher_sample,) = teacher.encode([_fixed_row()], generation=True)
        for name, title in _ARRAYS.items():
            if not np.array_equal(getattr(policy_sample, name), getattr(teacher_sample, name)):
                differing = f"{title} of a prompt with an image"
                break
    if differing:
        raise ConfigError(
            f"algorithm.teacher={folder} and the policy's {processor.folder} have different {differing}, so that the "
            "teacher would score other responses than the policy gave; give a teacher with the policy's tokenizer, "
            "template and image processor (data.template=think takes the same template for both)"
        )


def _fixed_row() -> Row:
    """Return a prompt of an image, a ramp of colours, and a question."""
    ramp = np.arange(_HEIGHT * _WIDTH * 3, dtype=np.uint32).reshape(_HEIGHT, _WIDTH, 3) % 251
    image = PIL.Image.fromarray(ramp.astype(np.uint8))
    message = Message("user", (ImagePart(image=image), TextPart(_QUESTION)))
    return Row((message,), answer="3", where="the fixed prompt of the teacher's check")
