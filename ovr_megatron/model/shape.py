"""The shape of a Qwen2.5-VL model, read from its Hugging Face ``config.json``.  No torch, no Megatron."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ShapeError(ValueError):
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
class ModelShape:
    """Sizes and special ids of one Qwen2.5-VL model."""

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
            return cls._parse(raw)
        except KeyError as error:
            raise ShapeError(f"{path}: field {error.args[0]!r} is missing") from None

    @classmethod
    def _parse(cls, raw: dict[str, Any]) -> ModelShape:
        text = raw.get("text_config") or raw
        vision = raw["vision_config"]
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        theta = rope.get("rope_theta", text.get("rope_theta"))
        if theta is None:
            raise KeyError("rope_theta")
        # Older exports keep the tie flag on the outer level only, newer ones write it on both: outer wins.
        tied = raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        return cls(
            layers=text["num_hidden_layers"],
            hidden=text["hidden_size"],
            ffn=text["intermediate_size"],
            heads=text["num_attention_heads"],
            kv_heads=text["num_key_value_heads"],
            head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
            vocab=text["vocab_size"],
            norm_eps=text.get("rms_norm_eps", 1e-6),
            rope_theta=float(theta),
            mrope_section=tuple(rope["mrope_section"]),
            max_positions=text.get("max_position_embeddings", 32768),
            tied=bool(tied),
            vision=VisionShape(
                depth=vision["depth"],
                hidden=vision["hidden_size"],
                ffn=vision["intermediate_size"],
                heads=vision["num_heads"],
                in_channels=vision.get("in_channels", vision.get("in_chans", 3)),
                patch=vision.get("patch_size", vision.get("spatial_patch_size", 14)),
                temporal_patch=vision.get("temporal_patch_size", 2),
                merge=vision.get("spatial_merge_size", 2),
                window=vision["window_size"],
                full_attention_layers=tuple(vision["fullatt_block_indexes"]),
                tokens_per_second=vision.get("tokens_per_second", 2),
            ),
            image_token=raw["image_token_id"],
            video_token=raw["video_token_id"],
            vision_start_token=raw["vision_start_token_id"],
            vision_end_token=raw.get("vision_end_token_id", raw["vision_start_token_id"] + 1),
        )
