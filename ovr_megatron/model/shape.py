"""The shape of a Qwen2.5-VL model, read from its Hugging Face ``config.json``.  No torch, no Megatron."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovr_megatron.config import ConfigError
from ovr_megatron.model.config_json import (
    OuterFields,
    RopeFields,
    ShapeError,
    TextFields,
    VisionFields,
    check_numbers,
    is_number,
    read_config,
    read_fields,
)

# Qwen2.5-VL's config.json allows 128000 positions, but its training and its model card end here.
TRAINED_POSITIONS = 32768
LONGEST_RESPONSE = 32768
"""Tokens of an evaluated response where no limit is set: reasoning models write thousands."""
_YARN_OPTIONS = ("beta_fast", "beta_slow", "attention_factor")
_YARN_FIELDS = {"type", "rope_type", "rope_theta", "mrope_section", "truncate", *_YARN_OPTIONS}
_YARN_FIELDS |= {"factor", "original_max_position_embeddings"}


@dataclass(frozen=True)
class VisionShape:
    """Vision tower: ``depth`` blocks of ``heads`` heads; ``window`` is in pixels."""

    depth: int
    hidden: int
    ffn: int
    heads: int
    in_channels: int
    patch: int
    temporal_patch: int
    merge: int
    window: int
    full_attention_layers: tuple[int, ...]
    tokens_per_second: float

    @property
    def patch_dim(self) -> int:
        """Return the elements of one patch: channels x temporal patch x patch x patch."""
        return self.in_channels * self.temporal_patch * self.patch**2


@dataclass(frozen=True)
class Yarn:
    """YaRN: rotary frequencies for ``factor`` times the ``original_positions``.

    Pairs that turn more than ``beta_fast`` times within the original positions keep their frequency, those that turn
    less than ``beta_slow`` times have it divided by ``factor``, with a ramp in between, whose ends are whole pairs if
    ``truncate``.  Cosines and sines are multiplied by ``attention_factor``.
    """

    factor: float
    original_positions: int
    attention_factor: float
    beta_fast: float = 32
    beta_slow: float = 1
    truncate: bool = True


@dataclass(frozen=True)
class ModelShape:
    """Sizes and special ids of one Qwen2.5-VL model.

    ``max_positions`` is its longest document, YaRN included.  ``after_video`` is the rule of positions that the model
    was trained with (`ovr_megatron.data.positions.mrope_positions`), None where the folder does not say.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_positions: int
    tied: bool
    vision: VisionShape
    image_token: int
    video_token: int
    vision_start_token: int
    vision_end_token: int
    yarn: Yarn | None = None
    after_video: str | None = None

    @property
    def trained_positions(self) -> int:
        """Return the positions without YaRN."""
        return self.yarn.original_positions if self.yarn else min(self.max_positions, TRAINED_POSITIONS)

    def check_length(self, tokens: int, setting: str) -> None:
        """Refuse a document of ``tokens``, asked for by ``setting``, that is longer than the model's positions.

        Raises:
            ConfigError: names the setting, both lengths and the remedy.
        """
        if tokens > self.max_positions:
            factor = math.ceil(tokens / self.trained_positions)
            raise ConfigError(
                f"{setting} comes to {tokens} tokens, and the model has {self.max_positions} positions; lower it, or "
                f"give the model more with YaRN: tools/convert_from_hf.py --yarn {factor}"
            )

    def response_limit(self, max_tokens: int, prompt_tokens: int) -> int:
        """Return ``max_tokens``, or for 0 the positions that a prompt leaves, at most `LONGEST_RESPONSE` tokens."""
        return max_tokens or max(1, min(LONGEST_RESPONSE, self.max_positions - prompt_tokens))

    @classmethod
    def from_hf(cls, directory: str | Path) -> ModelShape:
        """Read ``config.json`` of ``directory`` in the flat layout of Transformers 4 or the nested one of 5.

        Raises:
            ShapeError: the file is missing, is not JSON, is of another model, lacks a field, or asks for a feature
                that is not computed here.
        """
        raw, path = read_config(directory)
        nested = raw.get("text_config") is not None
        values = raw["text_config"] if nested else raw
        text = read_fields(TextFields, values, path, "text_config." if nested else "")
        vision = read_fields(VisionFields, raw.get("vision_config", {}), path, "vision_config.")
        outer = read_fields(OuterFields, raw, path)
        # Transformers 4 says rope_scaling, 5 rope_parameters; where both stand it takes the first.
        rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            raise ShapeError(f"{path}: field 'rope_scaling' is {rope!r} and not an object")
        angles = read_fields(RopeFields, {"rope_theta": values.get("rope_theta"), **rope}, path)
        head_dim = text.head_dim or text.hidden_size // text.num_attention_heads
        check_numbers(text, vision, outer, head_dim, path)
        section = tuple(angles.mrope_section)
        if len(section) != 3 or 2 * sum(section) != head_dim:
            raise ShapeError(f"{path}: mrope_section {list(section)} is not three numbers of sum {head_dim // 2}")
        positions = text.max_position_embeddings
        yarn = _read_yarn(rope, positions, path)
        return cls(
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
            # vLLM stops at the first of the two.
            max_positions=min(positions, int(yarn.factor * yarn.original_positions)) if yarn else positions,
            yarn=yarn,
            tied=_read_tied(raw, values, path),
            vision=_vision_shape(vision),
            image_token=outer.image_token_id,
            video_token=outer.video_token_id,
            vision_start_token=outer.vision_start_token_id,
            vision_end_token=(
                outer.vision_start_token_id + 1 if outer.vision_end_token_id is None else outer.vision_end_token_id
            ),
            after_video=outer.after_video,
        )


def _vision_shape(vision: VisionFields) -> VisionShape:
    return VisionShape(
        depth=vision.depth,
        hidden=vision.hidden_size,
        ffn=vision.intermediate_size,
        heads=vision.num_heads,
        in_channels=3,
        patch=vision.patch_size or vision.spatial_patch_size or 14,
        temporal_patch=vision.temporal_patch_size,
        merge=vision.spatial_merge_size,
        window=vision.window_size,
        full_attention_layers=vision.fullatt_block_indexes,
        tokens_per_second=vision.tokens_per_second,
    )


def _read_tied(raw: dict[str, Any], text: dict[str, Any], path: Path) -> bool:
    """Return whether input and output embedding are tied.

    Older exports have the flag on the outer level only, newer ones on both: the outer one wins.
    """
    tied = raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    if not isinstance(tied, bool):
        raise ShapeError(f"{path}: field 'tie_word_embeddings' is {tied!r}; it can be true or false")
    return tied


def _read_yarn(rope: dict[str, Any], positions: int, path: Path) -> Yarn | None:
    """Return the YaRN of the rotary part of ``config.json``; Transformers and vLLM read the same fields."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", "mrope"):
        return None
    if kind != "yarn":
        raise ShapeError(f"{path}: rotary type {kind!r} is not known; it can be 'mrope', 'default' or 'yarn'")
    if unknown := sorted(set(rope) - _YARN_FIELDS):
        raise ShapeError(f"{path}: field {unknown[0]!r} of YaRN is not known; remove it")
    options = {name: rope[name] for name in _YARN_OPTIONS if rope.get(name) is not None}
    if "factor" not in rope:
        raise ShapeError(f"{path}: field 'factor' is missing")
    original = rope.get("original_max_position_embeddings", positions)
    numbers = {**options, "factor": rope["factor"], "original_max_position_embeddings": original}
    for name, value in numbers.items():
        if not is_number(value) or value <= 0 or (name == "factor" and value < 1):
            raise ShapeError(f"{path}: field {name!r} of YaRN is {value!r}; give a number above 0, for 'factor' from 1")
    options.setdefault("attention_factor", 0.1 * math.log(rope["factor"]) + 1.0)
    return Yarn(rope["factor"], original, truncate=bool(rope.get("truncate", True)), **options)


def stretch_positions(directory: str | Path, factor: float) -> ModelShape:
    """Write YaRN with ``factor`` into ``config.json`` of ``directory``, over any YaRN in it.

    From then on it is read by this project, Transformers and vLLM, and exports have it, too.

    Raises:
        ConfigError: ``factor`` stretches nothing.
        ShapeError: as `ModelShape.from_hf`.
    """
    if not factor > 1:
        raise ConfigError(f"--yarn {factor:g} gives no more positions; it must be above 1")
    original = ModelShape.from_hf(directory).trained_positions
    path = Path(directory) / "config.json"
    config = json.loads(path.read_text())
    text = config.get("text_config") or config
    for part in [text] if text is config else [text, config]:
        for name in ("rope_scaling", "rope_parameters"):
            if part.get(name):
                part[name] = _stretched(part[name], factor, original)
        if part is text or "max_position_embeddings" in part:
            part["max_position_embeddings"] = int(factor * original)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return ModelShape.from_hf(directory)


def _stretched(rope: dict[str, Any], factor: float, original: int) -> dict[str, Any]:
    """Return the rotary part with YaRN, its type under the field names that it has."""
    angles = {name: rope[name] for name in ("rope_theta", "mrope_section") if name in rope}
    kinds = [name for name in ("type", "rope_type") if name in rope] or ["rope_type"]
    return angles | dict.fromkeys(kinds, "yarn") | {"factor": factor, "original_max_position_embeddings": original}
