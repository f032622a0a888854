"""Fields of ``config.json`` that decoders of several families share: their bounds, and how they must fit together.

No torch, no Megatron.  The defaults are those of Transformers, since a folder may leave out what equals them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ovr_megatron.families import ModelShape, VisionShape
from ovr_megatron.families.config_json import (
    Depth,
    Fields,
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


class DecoderFields(Fields):
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
    layer_types: list[str] | None = None
    # Dropout is not computed.
    attention_dropout: Annotated[float, Field(ge=0, le=0)] | None = 0.0


class TokenFields(Fields):
    """Special ids and the rule after a video, on the outer level."""

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


def read_rope(values: dict[str, object], path: Path) -> tuple[dict[str, object], RopeFields]:
    """Return the rotary part of a language model's fields ``values``, as it stands there and checked.

    Raises:
        ShapeError: it is no object, or a field is missing or out of its bounds.
    """
    # Transformers 4 says rope_scaling, 5 rope_parameters; where both stand it takes the first.
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ShapeError(f"{path}: field 'rope_scaling' is {rope!r} and not an object")
    angles = read_fields(RopeFields, {"rope_theta": values.get("rope_theta"), **rope}, path)
    return rope, angles


def _mrope_section(angles: RopeFields, head_dim: int, path: Path) -> tuple[int, int, int]:
    """Return the rotary pairs of time, height and width.

    Raises:
        ShapeError: they are not three numbers that add up to the pairs of a head.
    """
    section = tuple(angles.mrope_section)
    if len(section) != 3 or 2 * sum(section) != head_dim:
        raise ShapeError(f"{path}: mrope_section {list(section)} is not three numbers of sum {head_dim // 2}")
    return section


def _read_tied(raw: dict[str, object], text: dict[str, object], path: Path) -> bool:
    """Return whether input and output embedding are tied.

    Older exports have the flag on the outer level only, newer ones on both: the outer one wins.

    Raises:
        ShapeError: the flag is no Boolean.
    """
    tied = raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    if not isinstance(tied, bool):
        raise ShapeError(f"{path}: field 'tie_word_embeddings' is {tied!r}; it can be true or false")
    return tied


def _vision_end_token(tokens: TokenFields) -> int:
    """Return the id that closes an image; where the file leaves it out, the one after the id that opens it."""
    if tokens.vision_end_token_id is None:
        # In the vocabulary of every published model it follows the token that it closes.
        return tokens.vision_start_token_id + 1
    return tokens.vision_end_token_id


def decoder_problems(text: DecoderFields, head_dim: int) -> Iterator[str]:
    """Yield a sentence for each pair of numbers that is no model, and for attention that is not computed here."""
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


def tower_problems(hidden: int, heads: int, out_hidden: int | None, text: DecoderFields) -> Iterator[str]:
    """Yield a sentence for each number of a vision tower that does not fit another.

    Args:
        hidden: Width of the tower.
        heads: Heads of one of its blocks.
        out_hidden: Width of its features, where the file says it.
        text: The language model that takes them.
    """
    # A head's rotary pairs turn by height and by width, as many by each.
    if hidden % (4 * heads):
        yield f"vision_config.hidden_size {hidden} is not a multiple of 4 x num_heads {heads}"
    if out_hidden not in (None, text.hidden_size):
        yield f"vision_config.out_hidden_size {out_hidden} is not hidden_size {text.hidden_size}"


def token_problems(text: DecoderFields, tokens: TokenFields) -> Iterator[str]:
    """Yield a sentence for each special id that is past the vocabulary or stands for two tokens."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids: dict[str, int] = {}
    for name in names:
        index = getattr(tokens, name)
        if index is not None:
            ids[name] = index
    for name, index in ids.items():
        if index >= text.vocab_size:
            yield f"field {name!r} is {index}, and vocab_size is {text.vocab_size}; ids lie below it"
    if len(set(ids.values())) < len(ids):
        yield f"two of {', '.join(names)} are the same id; each needs its own"


def refuse(problems: Iterable[str], path: Path) -> None:
    """Raise `ShapeError` with the first of ``problems``, where there is one."""
    for problem in problems:
        raise ShapeError(f"{path}: {problem}")


def model_shape(
    name: str,
    raw: dict[str, object],
    path: Path,
    *,
    values: dict[str, object],
    text: DecoderFields,
    head_dim: int,
    rope: dict[str, object],
    angles: RopeFields,
    vision: VisionShape,
    tokens: TokenFields,
) -> ModelShape:
    """Return the sizes of a model of fields that are checked.

    Args:
        name: Of the family.
        raw: The object in ``config.json``.
        path: The file, for messages.
        values: The language model's part of ``raw``.
        text: Its fields.
        head_dim: Columns of a head.
        rope: The rotary part of ``values``.
        angles: Its fields.
        vision: Sizes of the vision tower.
        tokens: Special ids.

    Raises:
        ShapeError: the rotary sections, YaRN or the flag of tied embeddings cannot be.
    """
    section = _mrope_section(angles, head_dim, path)
    positions = text.max_position_embeddings
    yarn = read_yarn(rope, positions, path)
    if yarn:
        # vLLM stops at the first of the two.
        stretched_positions = int(yarn.factor * yarn.original_positions)
        positions = min(positions, stretched_positions)
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
        vision=vision,
        image_token=tokens.image_token_id,
        video_token=tokens.video_token_id,
        vision_start_token=tokens.vision_start_token_id,
        vision_end_token=_vision_end_token(tokens),
        after_video=tokens.after_video,
    )
