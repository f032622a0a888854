"""Refuse a critic or a teacher for which the policy's samples mean something else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image

from ovr_megatron.config import ConfigError, DataConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.schema import ImagePart, Message, Row, TextPart
from ovr_megatron.families import ModelShape

# Patches and positions of the samples depend on these sizes.
_VISION_SIZES = ("in_channels", "patch", "temporal_patch", "merge", "tokens_per_second")
_QUESTION = "How many squares are blue? 3 + 4 = 7."
_WIDTH, _HEIGHT = 84, 56  # not square, so that a change of the sides shows
_TOKENS = {"tokens": "token ids"}
_IMAGE_ARRAYS = {"grid_thw": "patches of the image", "patches": "pixels", "position_ids": "positions"}


def check_reads_samples(
    setting: str,
    folder: Path,
    shape: ModelShape,
    processor: Processor,
    longest: int,
    same_template: bool = False,
) -> None:
    """Refuse a model that would read other token ids, patches or positions than the policy, or too few of them.

    Both processors encode one fixed prompt with an image.

    Args:
        setting: that names the model, with its value, for messages.
        folder: the model's, with its tokenizer and processor.
        shape: the model's.
        processor: the policy's.
        longest: most tokens of a prompt and its response together.
        same_template: whether the model's template must be the policy's, too.

    Raises:
        AssetError: the folder lacks the tokenizer or processor, or with ``same_template`` the template.
        ConfigError: names what differs.
    """
    _check_sizes(setting, shape, processor.shape)
    # The run's own limits may be too small for the fixed prompt.
    config = replace(processor.config, max_prompt_tokens=DataConfig().max_prompt_tokens, max_images=1)
    arrays = _TOKENS | _IMAGE_ARRAYS
    if not same_template:
        # The family's template: a folder may have none of its own.
        config = replace(config, template="think")
        arrays = _IMAGE_ARRAYS
    policy = Processor(processor.folder, config)
    model = Processor(folder, config)
    both = f"{setting} and the policy's {processor.folder}"
    _check_vocabularies(both, model, policy)
    (policy_sample,) = policy.encode([_fixed_row()], generation=True)
    (model_sample,) = model.encode([_fixed_row()], generation=True)
    for name, title in arrays.items():
        if not np.array_equal(getattr(policy_sample, name), getattr(model_sample, name)):
            raise ConfigError(
                f"{both} have different {title} of a prompt with an image, so that it would read other samples than "
                "the policy; give a model with the policy's tokenizer, template and image processor "
                "(data.template=think takes the same template for both)"
            )
    shape.check_length(longest, f"{setting} with the longest prompt and response")


def _check_sizes(setting: str, shape: ModelShape, policy: ModelShape) -> None:
    if shape.family != policy.family:
        raise ConfigError(f"{setting} is a model of family {shape.family}, and the policy's is {policy.family}")
    for name in _VISION_SIZES:
        size, policy_size = (getattr(vision, name, None) for vision in (shape.vision, policy.vision))
        if size != policy_size:
            raise ConfigError(
                f"{setting} has {name}={size} in its vision tower, and the policy {policy_size}: it cannot read the "
                "policy's images; give a model of the same series"
            )


def _check_vocabularies(both: str, model: Processor, policy: Processor) -> None:
    # Equal tokenizers have equal ids of images and videos: each folder is checked against its own.
    ids = model.tokenizer.get_vocab()
    policy_ids = policy.tokenizer.get_vocab()
    differing = sorted(token for token in ids.keys() | policy_ids.keys() if ids.get(token) != policy_ids.get(token))
    if differing:
        token = differing[0]
        raise ConfigError(
            f"{both} have different vocabularies: {len(differing)} tokens differ, {token!r} has the id "
            f"{ids.get(token)} there and {policy_ids.get(token)} here; give a model with the policy's tokenizer"
        )


def _fixed_row() -> Row:
    """Return a prompt of an image, a ramp of colours, and a question."""
    ramp = np.arange(_HEIGHT * _WIDTH * 3, dtype=np.uint32).reshape(_HEIGHT, _WIDTH, 3) % 251
    image = PIL.Image.fromarray(ramp.astype(np.uint8))
    message = Message("user", (ImagePart(image=image), TextPart(_QUESTION)))
    return Row((message,), answer="3", where="the fixed prompt of the samples' check")
