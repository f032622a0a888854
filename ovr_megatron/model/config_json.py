"""``config.json`` of a Qwen2.5-VL folder: its fields, their bounds, and the features that this project refuses.

No torch, no Megatron.  The defaults are those of Transformers, since a folder may leave out what equals them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ovr_megatron.errors import UserError

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
_DTYPES = ("float32", "bfloat16", "float16", "auto")
_EXCERPT = 80  # characters of a value that a message repeats

Width = Annotated[int, Field(strict=True, ge=1, le=1 << 20)]
Depth = Annotated[int, Field(strict=True, ge=1, le=1000)]
Vocabulary = Annotated[int, Field(strict=True, ge=1, le=1 << 22)]
Positions = Annotated[int, Field(strict=True, ge=1, le=1 << 30)]
Index = Annotated[int, Field(strict=True, ge=0, le=1 << 22)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]


class ShapeError(UserError, ValueError):
    """A ``config.json`` that is not a Qwen2.5-VL model we can build; names the file and the field."""


class _Fields(BaseModel):
    """Fields of a part of ``config.json``; those that are not listed are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")


Kind = TypeVar("Kind", bound=_Fields)


class TextFields(_Fields):
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
    use_sliding_window: Flag | None = False
    sliding_window: Positions | None = 4096
    max_window_layers: Annotated[int, Field(strict=True, ge=0)] | None = 80
    layer_types: list[str] | None = None
    attention_dropout: Annotated[float, Field(ge=0, le=0)] | None = 0.0


class VisionFields(_Fields):
    """Vision tower.  The 32B of Hugging Face leaves out the sizes that are Transformers' defaults."""

    hidden_size: Width
    intermediate_size: Width
    depth: Depth = 32
    num_heads: Width = 16
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


class OuterFields(_Fields):
    """Fields of the outer level in both layouts."""

    image_token_id: Index
    video_token_id: Index
    vision_start_token_id: Index
    vision_end_token_id: Index | None = None
    after_video: Literal["grid", "extent"] | None = None


class RopeFields(_Fields):
    """Rotary angles; YaRN's own fields are read by `ovr_megatron.model.shape`."""

    rope_theta: Positive
    mrope_section: list[Annotated[int, Field(strict=True, ge=1)]]
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] | None = None


def read_config(directory: str | Path) -> tuple[dict[str, Any], Path]:
    """Return ``config.json`` of ``directory`` and its path.

    Raises:
        ShapeError: it cannot be read, is not JSON, or is of another or a quantised model.
    """
    path = Path(directory) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ShapeError(f"{path} does not exist; give the folder of a Hugging Face Qwen2.5-VL model") from None
    except json.JSONDecodeError as error:
        raise ShapeError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    except UnicodeDecodeError:
        raise ShapeError(f"{path} is not text in UTF-8; download or copy it again") from None
    except RecursionError:
        raise ShapeError(f"{path} is nested too deeply; download or copy it again") from None
    except OSError as error:
        raise ShapeError(f"{path} cannot be read ({error.strerror}); make it readable or copy it again") from None
    if not isinstance(raw, dict):
        raise ShapeError(f"{path}: holds a {type(raw).__name__} and not an object; download or copy it again")
    if raw.get("model_type") != "qwen2_5_vl":
        raise ShapeError(f"{path}: model_type is {raw.get('model_type')!r}, expected 'qwen2_5_vl'")
    _check_kind(raw, path)
    return raw, path


def _check_kind(raw: dict[str, Any], path: Path) -> None:
    """Refuse quantised weights, another head and a dtype that is no float."""
    for part in (raw, raw.get("text_config")):
        if isinstance(part, dict) and part.get("quantization_config"):
            quantised = part["quantization_config"]
            method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
            raise ShapeError(
                f"{path}: field 'quantization_config' says that the weights are quantised ({method}); give the model "
                "that they were made from, in bfloat16 or float32"
            )
    architectures = raw.get("architectures") or [ARCHITECTURE]
    if not isinstance(architectures, list) or ARCHITECTURE not in architectures:
        raise ShapeError(f"{path}: field 'architectures' is {_excerpt(architectures)}; it must name {ARCHITECTURE}")
    for name in ("dtype", "torch_dtype"):
        if raw.get(name) is not None and raw[name] not in _DTYPES:
            raise ShapeError(f"{path}: field {name!r} is {_excerpt(raw[name])}; it can be {', '.join(_DTYPES)}")


def read_fields(kind: type[Kind], values: Any, path: Path, prefix: str = "") -> Kind:
    """Return the fields of one part of ``config.json``, each within its bounds.

    Args:
        kind: What to read.
        values: The part, as JSON gave it.
        path: The file, for messages.
        prefix: Where the part stands in the file, with a dot at its end.

    Raises:
        ShapeError: names the field, its value and what it can be.
    """
    if not isinstance(values, dict):
        raise ShapeError(f"{path}: field {prefix.rstrip('.')!r} is {_excerpt(values)} and not an object")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = prefix + str(first["loc"][0])
        if first["type"] == "missing":
            raise ShapeError(f"{path}: field {name!r} is missing") from None
        reason = first["msg"][:1].lower() + first["msg"][1:]
        raise ShapeError(f"{path}: field {name!r} is {_excerpt(first['input'])}: {reason}") from None


def check_numbers(text: TextFields, vision: VisionFields, outer: OuterFields, head_dim: int, path: Path) -> None:
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
        yield f"field 'layer_types' asks for {_excerpt(sorted(kinds))}; only full_attention is computed"
    windowed = text.use_sliding_window and text.sliding_window is not None and text.layer_types is None
    if windowed and (text.max_window_layers or 0) < text.num_hidden_layers:
        yield (
            f"field 'use_sliding_window' is true: layers from {text.max_window_layers or 0} on would attend to "
            f"{text.sliding_window} tokens; only full attention is computed, give a model without a sliding window"
        )


def _vision_problems(text: TextFields, vision: VisionFields) -> Iterator[str]:
    heads = vision.num_heads
    if vision.hidden_size % (4 * heads):
        yield f"vision_config.hidden_size {vision.hidden_size} is not a multiple of 4 x num_heads {heads}"
    if vision.patch_size and vision.spatial_patch_size and vision.patch_size != vision.spatial_patch_size:
        yield f"vision_config has patch_size {vision.patch_size} and spatial_patch_size {vision.spatial_patch_size}"
    merged = (vision.patch_size or vision.spatial_patch_size or 14) * vision.spatial_merge_size
    if vision.window_size % merged:
        yield f"vision_config.window_size {vision.window_size} is not a multiple of {merged} pixels, a merged patch"
    if vision.out_hidden_size not in (None, text.hidden_size):
        yield f"vision_config.out_hidden_size {vision.out_hidden_size} is not hidden_size {text.hidden_size}"
    late = [index for index in vision.fullatt_block_indexes if index >= vision.depth]
    if late and "fullatt_block_indexes" in vision.model_fields_set:
        yield f"vision_config.fullatt_block_indexes names block {late[0]}, and the tower has {vision.depth}"


def _token_problems(text: TextFields, outer: OuterFields) -> Iterator[str]:
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: getattr(outer, name) for name in names if getattr(outer, name) is not None}
    for name, index in ids.items():
        if index >= text.vocab_size:
            yield f"field {name!r} is {index}, and vocab_size is {text.vocab_size}; ids lie below it"
    if len(set(ids.values())) < len(ids):
        yield f"two of {', '.join(names)} are the same id; each needs its own"


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite number of JSON."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _excerpt(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _EXCERPT else text[:_EXCERPT] + "..."
