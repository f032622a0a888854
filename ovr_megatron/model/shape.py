"""The shape of a Qwen2.5-VL model, read from its Hugging Face ``config.json``.  No torch, no Megatron."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovr_megatron.config import ConfigError
from ovr_megatron.errors import UserError

# Qwen2.5-VL's config.json allows 128000 positions, but its training and its model card end here.
TRAINED_POSITIONS = 32768
_YARN_OPTIONS = ("beta_fast", "beta_slow", "attention_factor")
_YARN_FIELDS = {"type", "rope_type", "rope_theta", "mrope_section", "truncate", *_YARN_OPTIONS}
_YARN_FIELDS |= {"factor", "original_max_position_embeddings"}


class ShapeError(UserError, ValueError):
    """A ``config.json`` that is not a Qwen2.5-VL model we can build; names the file and the field."""


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
        """Numbers in one patch: channels x temporal patch x patch x patch."""
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
    """Sizes and special ids of one Qwen2.5-VL model; ``max_positions`` is its longest document, YaRN included."""

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

    @property
    def trained_positions(self) -> int:
        """Positions before YaRN."""
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

    @classmethod
    def from_hf(cls, directory: str | Path) -> ModelShape:
        """Read ``config.json`` of ``directory``; both the flat layout of Transformers 4 and the nested one of 5.

        Raises:
            ShapeError: the file is missing, is not JSON, is of another model, or lacks a field.
        """
        path = Path(directory) / "config.json"
        try:
            raw = json.loads(path.read_text())
        except FileNotFoundError:
            raise ShapeError(f"{path} does not exist; give the folder of a Hugging Face Qwen2.5-VL model") from None
        except json.JSONDecodeError as error:
            raise ShapeError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
        if raw.get("model_type") != "qwen2_5_vl":
            raise ShapeError(f"{path}: model_type is {raw.get('model_type')!r}, expected 'qwen2_5_vl'")
        try:
            return cls._parse(raw, path)
        except KeyError as error:
            raise ShapeError(f"{path}: field {error.args[0]!r} is missing") from None

    @classmethod
    def _parse(cls, raw: dict[str, Any], path: Path) -> ModelShape:
        text = raw.get("text_config") or raw
        vision = raw["vision_config"]
        # Transformers 4 says rope_scaling, 5 rope_parameters; where both stand it takes the first.
        rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
        theta = rope.get("rope_theta", text.get("rope_theta"))
        if theta is None:
            raise KeyError("rope_theta")
        # Older exports keep the tie flag on the outer level only, newer ones write it on both: outer wins.
        tied = raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        section = tuple(rope["mrope_section"])
        if len(section) != 3 or 2 * sum(section) != head_dim:
            raise ShapeError(f"{path}: mrope_section {list(section)} is not three numbers of sum {head_dim // 2}")
        positions = text.get("max_position_embeddings", 32768)
        yarn = _read_yarn(rope, positions, path)
        # The hub's 32B leaves out the sizes of the tower that are Transformers' defaults.
        return cls(
            layers=text["num_hidden_layers"],
            hidden=text["hidden_size"],
            ffn=text["intermediate_size"],
            heads=text["num_attention_heads"],
            kv_heads=text["num_key_value_heads"],
            head_dim=head_dim,
            vocab=text["vocab_size"],
            norm_eps=text.get("rms_norm_eps", 1e-6),
            rope_theta=float(theta),
            mrope_section=section,
            # vLLM stops at the first of the two.
            max_positions=min(positions, int(yarn.factor * yarn.original_positions)) if yarn else positions,
            yarn=yarn,
            tied=bool(tied),
            vision=VisionShape(
                depth=vision.get("depth", 32),
                hidden=vision["hidden_size"],
                ffn=vision["intermediate_size"],
                heads=vision.get("num_heads", 16),
                in_channels=vision.get("in_channels", vision.get("in_chans", 3)),
                patch=vision.get("patch_size", vision.get("spatial_patch_size", 14)),
                temporal_patch=vision.get("temporal_patch_size", 2),
                merge=vision.get("spatial_merge_size", 2),
                window=vision.get("window_size", 112),
                full_attention_layers=tuple(vision.get("fullatt_block_indexes", (7, 15, 23, 31))),
                tokens_per_second=vision.get("tokens_per_second", 2),
            ),
            image_token=raw["image_token_id"],
            video_token=raw["video_token_id"],
            vision_start_token=raw["vision_start_token_id"],
            vision_end_token=raw.get("vision_end_token_id", raw["vision_start_token_id"] + 1),
        )


def _read_yarn(rope: dict[str, Any], positions: int, path: Path) -> Yarn | None:
    """YaRN as the rotary part of ``config.json`` asks for it; Transformers and vLLM read the same fields."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", "mrope"):
        return None
    if kind != "yarn":
        raise ShapeError(f"{path}: rotary type {kind!r} is not known; it can be 'mrope', 'default' or 'yarn'")
    if unknown := sorted(set(rope) - _YARN_FIELDS):
        raise ShapeError(f"{path}: field {unknown[0]!r} of YaRN is not known; remove it")
    options = {name: rope[name] for name in _YARN_OPTIONS if rope.get(name) is not None}
    original = rope.get("original_max_position_embeddings", positions)
    for name, value in {**options, "factor": rope["factor"], "original_max_position_embeddings": original}.items():
        if not isinstance(value, int | float) or value <= 0 or (name == "factor" and value < 1):
            raise ShapeError(f"{path}: field {name!r} of YaRN is {value!r}; give a number above 0, for 'factor' from 1")
    options.setdefault("attention_factor", 0.1 * math.log(rope["factor"]) + 1.0)
    return Yarn(rope["factor"], original, truncate=bool(rope.get("truncate", True)), **options)


def stretch_positions(directory: str | Path, factor: float) -> ModelShape:
    """Write YaRN with ``factor`` into ``config.json`` of ``directory``; what it says of YaRN already is replaced.

    Everything that reads the folder has it from then on: this project, Transformers, vLLM, and what is exported.

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
    kept = {name: rope[name] for name in ("rope_theta", "mrope_section") if name in rope}
    kinds = [name for name in ("type", "rope_type") if name in rope] or ["rope_type"]
    return kept | dict.fromkeys(kinds, "yarn") | {"factor": factor, "original_max_position_embeddings": original}
