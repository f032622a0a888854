"""Sizes of a Qwen3-VL model: the fields of its ``config.json``, their bounds, and the features that are refused.

No torch, no Megatron.  The defaults are those of Transformers, since a folder may leave out what equals them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ovr_megatron.families import ModelShape, VisionShape
from ovr_megatron.families.config_json import Depth, Fields, Index, Positions, Positive, Width, read_fields
from ovr_megatron.families.decoder_fields import (
    DecoderFields,
    TokenFields,
    decoder_problems,
    model_shape,
    read_rope,
    refuse,
    token_problems,
    tower_problems,
)


@dataclass(frozen=True)
class DeepStackVisionShape(VisionShape):
    """A vision tower whose blocks attend to whole frames.

    ``positions_side`` is the side of the square of learned positions.  Features are also taken after the blocks
    ``deepstack_blocks`` and added to the outputs of as many of the decoder's first layers (DeepStack, arXiv
    2406.04334).
    """

    has_layer_norm: ClassVar[bool] = True
    has_gate: ClassVar[bool] = False

    positions_side: int
    deepstack_blocks: tuple[int, ...]

    @property
    def layer_features(self) -> int:
        """Return how many of the decoder's first layers have features added to their output."""
        return len(self.deepstack_blocks)


def vision_shape(shape: ModelShape) -> DeepStackVisionShape:
    """Return the sizes of the vision tower of a model of this family."""
    assert isinstance(shape.vision, DeepStackVisionShape)
    return shape.vision


class LanguageFields(DecoderFields):
    """Language model."""

    rms_norm_eps: Annotated[Positive, Field(lt=1)] = 1e-6
    head_dim: Width = 128
    max_position_embeddings: Positions = 128000
    attention_bias: Literal[False] | None = False


class TowerFields(Fields):
    """Vision tower."""

    depth: Depth = 27
    hidden_size: Width = 1152
    intermediate_size: Width = 4304
    num_heads: Width = 16
    in_channels: Literal[3] = 3
    patch_size: Width = 16
    temporal_patch_size: Annotated[int, Field(strict=True, ge=1, le=64)] = 2
    spatial_merge_size: Annotated[int, Field(strict=True, ge=1, le=64)] = 2
    num_position_embeddings: Width = 2304
    deepstack_visual_indexes: tuple[Index, ...] = (8, 16, 24)
    out_hidden_size: Width = 3584
    hidden_act: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"


class InterleavedFields(Fields):
    """The order of the rotary pairs, which vLLM takes from this flag and Transformers from the model's class."""

    mrope_interleaved: Literal[True]


def read_shape(name: str, raw: dict[str, object], path: Path) -> ModelShape:
    """Read ``config.json``, whose language model is always in ``text_config``.

    Args:
        name: Of the family.
        raw: The object in the file.
        path: The file, for messages.

    Raises:
        ShapeError: a field is missing or out of its bounds, or asks for a feature that is not computed here.
    """
    values = raw.get("text_config")
    text = read_fields(LanguageFields, values, path, "text_config.")
    assert isinstance(values, dict)  # `read_fields` has refused anything else
    vision = read_fields(TowerFields, raw.get("vision_config", {}), path, "vision_config.")
    tokens = read_fields(TokenFields, raw, path)
    rope, angles = read_rope(values, path)
    read_fields(InterleavedFields, rope, path, "text_config.rope_scaling.")
    problems = (
        *decoder_problems(text, text.head_dim),
        *tower_problems(vision.hidden_size, vision.num_heads, vision.out_hidden_size, text),
        *_deepstack_problems(text, vision),
        *token_problems(text, tokens),
    )
    refuse(problems, path)
    return model_shape(
        name,
        raw,
        path,
        values=values,
        text=text,
        head_dim=text.head_dim,
        rope=rope,
        angles=angles,
        vision=_vision_shape(vision),
        tokens=tokens,
    )


def _vision_shape(vision: TowerFields) -> DeepStackVisionShape:
    return DeepStackVisionShape(
        depth=vision.depth,
        hidden=vision.hidden_size,
        ffn=vision.intermediate_size,
        heads=vision.num_heads,
        in_channels=vision.in_channels,
        patch=vision.patch_size,
        temporal_patch=vision.temporal_patch_size,
        merge=vision.spatial_merge_size,
        positions_side=math.isqrt(vision.num_position_embeddings),
        deepstack_blocks=vision.deepstack_visual_indexes,
    )


def _deepstack_problems(text: LanguageFields, vision: TowerFields) -> Iterator[str]:
    count = vision.num_position_embeddings
    if math.isqrt(count) ** 2 != count:
        yield f"vision_config.num_position_embeddings {count} is not the square of a whole number"
    blocks = vision.deepstack_visual_indexes
    name = "vision_config.deepstack_visual_indexes"
    if list(blocks) != sorted(set(blocks)):
        yield f"{name} {list(blocks)} does not rise"
    elif blocks and blocks[-1] >= vision.depth:
        yield f"{name} names block {blocks[-1]}, and the tower has {vision.depth}"
    if len(blocks) > text.num_hidden_layers:
        yield f"{name} names {len(blocks)} blocks, and the language model has {text.num_hidden_layers} layers"
