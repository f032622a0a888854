"""Sizes of a Qwen2.5-VL model: the fields of its ``config.json``, their bounds, and the features that are refused.

No torch, no Megatron.  The defaults are those of Transformers, since a folder may leave out what equals them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ovr_megatron.families import ModelShape, VisionShape
from ovr_megatron.families.config_json import (
    Depth,
    Fields,
    Flag,
    Index,
    Positions,
    Positive,
    Width,
    read_fields,
)
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

SERVED_AFTER_VIDEO = "extent"  # `Qwen2_5_VLForConditionalGeneration.get_mrope_input_positions` of vLLM 0.32


@dataclass(frozen=True)
class WindowedVisionShape(VisionShape):
    """A vision tower with window attention; ``window`` is in pixels, ``full_attention_layers`` see a whole frame."""

    window: int
    full_attention_layers: tuple[int, ...]
    tokens_per_second: float

    @property
    def attention_side(self) -> int:
        """Return the features along the side of a window."""
        return max(1, self.window // self.patch // self.merge)


def vision_shape(shape: ModelShape) -> WindowedVisionShape:
    """Return the sizes of the vision tower of a model of this family."""
    assert isinstance(shape.vision, WindowedVisionShape)
    return shape.vision


class TextFields(DecoderFields):
    """Language model."""

    # Refused later where it would take effect: `_text_problems`.
    use_sliding_window: Flag | None = False
    sliding_window: Positions | None = 4096
    max_window_layers: Annotated[int, Field(strict=True, ge=0)] | None = 80


class VisionFields(Fields):
    """Vision tower.  The 32B of Hugging Face leaves out the sizes that are Transformers' defaults."""

    hidden_size: Width
    intermediate_size: Width
    depth: Depth = 32
    num_heads: Width = 16
    # Qwen's files say in_chans, Transformers in_channels.
    in_channels: Literal[3] | None = None
    in_chans: Literal[3] | None = None
    patch_size: Width | None = None
    spatial_patch_size: Width | None = None
    temporal_patch_size: Annotated[int, Field(strict=True, ge=1, le=64)] = 2
    spatial_merge_size: Annotated[int, Field(strict=True, ge=1, le=64)] = 2
    window_size: Width = 112
    fullatt_block_indexes: tuple[Index, ...] = (7, 15, 23, 31)
    tokens_per_second: Positive = 4
    out_hidden_size: Width | None = None
    hidden_act: Literal["silu"] = "silu"


def read_shape(name: str, raw: dict[str, object], path: Path) -> ModelShape:
    """Read ``config.json`` in the flat layout of Transformers 4 or the nested one of 5.

    Args:
        name: Of the family.
        raw: The object in the file.
        path: The file, for messages.

    Raises:
        ShapeError: a field is missing or out of its bounds, or asks for a feature that is not computed here.
    """
    nested = raw.get("text_config") is not None
    values = raw["text_config"] if nested else raw
    text = read_fields(TextFields, values, path, "text_config." if nested else "")
    vision = read_fields(VisionFields, raw.get("vision_config", {}), path, "vision_config.")
    tokens = read_fields(TokenFields, raw, path)
    assert isinstance(values, dict)  # `read_fields` has refused anything else
    rope, angles = read_rope(values, path)
    head_dim = text.head_dim or text.hidden_size // text.num_attention_heads
    problems = (*_text_problems(text, head_dim), *_vision_problems(text, vision), *token_problems(text, tokens))
    refuse(problems, path)
    return model_shape(
        name,
        raw,
        path,
        values=values,
        text=text,
        head_dim=head_dim,
        rope=rope,
        angles=angles,
        vision=_vision_shape(vision),
        tokens=tokens,
    )


def _vision_shape(vision: VisionFields) -> WindowedVisionShape:
    """Return the sizes of the tower; ``window`` is in pixels, ``merge`` the side of a merged square in patches."""
    return WindowedVisionShape(
        depth=vision.depth,
        hidden=vision.hidden_size,
        ffn=vision.intermediate_size,
        heads=vision.num_heads,
        in_channels=3,
        patch=_patch_size(vision),
        temporal_patch=vision.temporal_patch_size,
        merge=vision.spatial_merge_size,
        window=vision.window_size,
        full_attention_layers=vision.fullatt_block_indexes,
        tokens_per_second=vision.tokens_per_second,
    )


def _patch_size(vision: VisionFields) -> int:
    """Return the side of a patch in pixels."""
    # Older folders say spatial_patch_size, and some leave the size out; every published tower has patches of 14.
    return vision.patch_size or vision.spatial_patch_size or 14


def _text_problems(text: TextFields, head_dim: int) -> Iterator[str]:
    yield from decoder_problems(text, head_dim)
    # Where ``layer_types`` is given, it alone says how a layer attends.
    windowed = text.use_sliding_window and text.sliding_window is not None and text.layer_types is None
    full_layers = text.max_window_layers or 0
    if windowed and full_layers < text.num_hidden_layers:
        yield (
            f"field 'use_sliding_window' is true: layers from {full_layers} on would attend to "
            f"{text.sliding_window} tokens; only full attention is computed, give a model without a sliding window"
        )


def _vision_problems(text: TextFields, vision: VisionFields) -> Iterator[str]:
    yield from tower_problems(vision.hidden_size, vision.num_heads, vision.out_hidden_size, text)
    both_sizes = vision.patch_size and vision.spatial_patch_size
    if both_sizes and vision.patch_size != vision.spatial_patch_size:
        yield f"vision_config has patch_size {vision.patch_size} and spatial_patch_size {vision.spatial_patch_size}"
    merged = _patch_size(vision) * vision.spatial_merge_size
    if vision.window_size % merged:
        yield f"vision_config.window_size {vision.window_size} is not a multiple of {merged} pixels, a merged patch"
    late = [index for index in vision.fullatt_block_indexes if index >= vision.depth]
    # Only where the file names them: the defaults of Transformers reach beyond a small tower.
    if late and "fullatt_block_indexes" in vision.model_fields_set:
        yield f"vision_config.fullatt_block_indexes names block {late[0]}, and the tower has {vision.depth}"
