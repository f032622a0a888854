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
    ShapeError,
    Vocabulary,
    Width,
    excerpt,
    read_fields,
)
from ovr_megatron.families.yarn import read_yarn

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


class TextFields(Fields):
    """Language model."""

    num_hidden_layers: Depth
    hidden_size: Width
    intermediate_size: Width
    num_attention_heads: Width
    num_key_value_heads: Width
    vocab_size: Vocabulary
    head_dim: Width | None = None
    rms_norm_eps: Annotated[Positive, Field(lt=1)] = 1e-5
    max_position_embeddings: Positions = 32768
    hidden_act: Literal["silu"] = "silu"
    # Refused later where it would take effect: `_text_problems`.
    use_sliding_window: Flag | None = False
    sliding_window: Positions | None = 4096
    max_window_layers: Annotated[int, Field(strict=True, ge=0)] | None = 80
    layer_types: list[str] | None = None
    # Dropout is not computed.
    attention_dropout: Annotated[float, Field(ge=0, le=0)] | None = 0.0


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


class OuterFields(Fields):
    """Fields of the outer level in both layouts."""

    image_token_id: Index
    video_token_id: Index
    vision_start_token_id: Index
    vision_end_token_id: Index | None = None
    after_video: Literal["grid", "extent"] | None = None


class RopeFields(Fields):
    """Rotary angles; YaRN's own fields are read by `ovr_megatron.families.yarn`."""

    rope_theta: Positive
    mrope_section: list[Annotated[int, Field(strict=True, ge=1)]]
    # All columns of a head turn.
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] | None = None


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
    outer = read_fields(OuterFields, raw, path)
    assert isinstance(values, dict)  # `read_fields` has refused anything else
    # Transformers 4 says rope_scaling, 5 rope_parameters; where both stand it takes the first.
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ShapeError(f"{path}: field 'rope_scaling' is {rope!r} and not an object")
    angles = read_fields(RopeFields, {"rope_theta": values.get("rope_theta"), **rope}, path)
    head_dim = text.head_dim or text.hidden_size // text.num_attention_heads
    _check_numbers(text, vision, outer, head_dim, path)
    section = tuple(angles.mrope_section)
    if len(section) != 3 or 2 * sum(section) != head_dim:
        raise ShapeError(f"{path}: mrope_section {list(section)} is not three numbers of sum {head_dim // 2}")
    positions = text.max_position_embeddings
    yarn = read_yarn(rope, positions, path)
    if yarn:
        # vLLM stops at the first of the two.
        stretched_positions = int(yarn.factor * yarn.original_positions)
        positions = min(positions, stretched_positions)
    vision_end_token = outer.vision_end_token_id
    if vision_end_token is None:
        # In the vocabulary of every published model it follows the token that it closes.
        vision_end_token = outer.vision_start_token_id + 1
    return ModelShape(
        family=name,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        ffn=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=head_dim,
        vocab=text.vocab_size,
        norm_eps=text.rms_norm_eps,
        rope_theta=float(angles.rope_theta),
        mrope_section=section,
        max_positions=positions,
        yarn=yarn,
        tied=_read_tied(raw, values, path),
        vision=_vision_shape(vision),
        image_token=outer.image_token_id,
        video_token=outer.video_token_id,
        vision_start_token=outer.vision_start_token_id,
        vision_end_token=vision_end_token,
        after_video=outer.after_video,
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


def _read_tied(raw: dict[str, object], text: dict[str, object], path: Path) -> bool:
    """Return whether input and output embedding are tied.

    Older exports have the flag on the outer level only, newer ones on both: the outer one wins.
    """
    tied = raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    if not isinstance(tied, bool):
        raise ShapeError(f"{path}: field 'tie_word_embeddings' is {tied!r}; it can be true or false")
    return tied


def _check_numbers(text: TextFields, vision: VisionFields, outer: OuterFields, head_dim: int, path: Path) -> None:
    """Refuse numbers that are no model together, and attention that is not computed here.

    Raises:
        ShapeError: names the fields and both numbers.
    """
    for problem in (*_text_problems(text, head_dim), *_vision_problems(text, vision), *_token_problems(text, outer)):
        raise ShapeError(f"{path}: {problem}")


def _text_problems(text: TextFields, head_dim: int) -> Iterator[str]:
    heads = text.num_attention_heads
    groups = text.num_key_value_heads
    if text.head_dim is None and text.hidden_size % heads:
        yield f"hidden_size {text.hidden_size} is not a multiple of num_attention_heads {heads}"
    if heads % groups:
        yield f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}"
    if head_dim % 2:
        yield f"the head size {head_dim} is odd, and rotary angles turn pairs"
    kinds = set(text.layer_types or ()) - {"full_attention"}
    if kinds:
        yield f"field 'layer_types' asks for {excerpt(sorted(kinds))}; only full_attention is computed"
    # Where ``layer_types`` is given, it alone says how a layer attends.
    windowed = text.use_sliding_window and text.sliding_window is not None and text.layer_types is None
    full_layers = text.max_window_layers or 0
    if windowed and full_layers < text.num_hidden_layers:
        yield (
            f"field 'use_sliding_window' is true: layers from {full_layers} on would attend to "
            f"{text.sliding_window} tokens; only full attention is computed, give a model without a sliding window"
        )


def _vision_problems(text: TextFields, vision: VisionFields) -> Iterator[str]:
    heads = vision.num_heads
    # A head's rotary pairs turn by height and by width, as many by each.
    if vision.hidden_size % (4 * heads):
        yield f"vision_config.hidden_size {vision.hidden_size} is not a multiple of 4 x num_heads {heads}"
    both_sizes = vision.patch_size and vision.spatial_patch_size
    if both_sizes and vision.patch_size != vision.spatial_patch_size:
        yield f"vision_config has patch_size {vision.patch_size} and spatial_patch_size {vision.spatial_patch_size}"
    merged = _patch_size(vision) * vision.spatial_merge_size
    if vision.window_size % merged:
        yield f"vision_config.window_size {vision.window_size} is not a multiple of {merged} pixels, a merged patch"
    if vision.out_hidden_size not in (None, text.hidden_size):
        yield f"vision_config.out_hidden_size {vision.out_hidden_size} is not hidden_size {text.hidden_size}"
    late = [index for index in vision.fullatt_block_indexes if index >= vision.depth]
    # Only where the file names them: the defaults of Transformers reach beyond a small tower.
    if late and "fullatt_block_indexes" in vision.model_fields_set:
        yield f"vision_config.fullatt_block_indexes names block {late[0]}, and the tower has {vision.depth}"


def _token_problems(text: TextFields, outer: OuterFields) -> Iterator[str]:
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids: dict[str, int] = {}
    for name in names:
        index = getattr(outer, name)
        if index is not None:
            ids[name] = index
    for name, index in ids.items():
        if index >= text.vocab_size:
            yield f"field {name!r} is {index}, and vocab_size is {text.vocab_size}; ids lie below it"
    if len(set(ids.values())) < len(ids):
        yield f"two of {', '.join(names)} are the same id; each needs its own"
