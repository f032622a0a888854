"""Qwen2.5-VL: what the rest of the code asks of it (`ovr_megatron.families`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovr_megatron.config import DataConfig
from ovr_megatron.families import Family, ModelShape
from ovr_megatron.families.assets import ProcessorFiles, SpecialTokens
from ovr_megatron.families.positions import Visual
from ovr_megatron.families.qwen2_5_vl import flops, presets, shape, tiny, weights

if TYPE_CHECKING:
    import numpy as np


# Transformers, Megatron and vLLM take seconds to import: each function imports its own when it is called.
def _load_processor_class() -> type[Any]:
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor

    return Qwen2_5_VLProcessor


def _load_model_class() -> type[Any]:
    from ovr_megatron.families.qwen2_5_vl.model import Qwen25VL

    return Qwen25VL


def _load_rollout_class() -> type[Any]:
    from ovr_megatron.families.qwen2_5_vl.rollout import Qwen25VLRollout

    return Qwen25VLRollout


def _positions(segments: Sequence[int | Visual], sizes: ModelShape, after_video: str) -> np.ndarray:
    from ovr_megatron.families.qwen2_5_vl.positions import positions

    return positions(segments, sizes, after_video)


def _image_grid(width: int, height: int, sizes: ModelShape, config: DataConfig) -> Visual:
    from ovr_megatron.families.qwen2_5_vl.pixels import image_grid

    return image_grid(width, height, sizes, config)


def _video_grid(frames: int, width: int, height: int, fps: float, sizes: ModelShape, config: DataConfig) -> Visual:
    from ovr_megatron.families.qwen2_5_vl.pixels import video_grid

    return video_grid(frames, width, height, fps, sizes, config)


def _decoder_options(sizes: ModelShape) -> Mapping[str, object]:
    return {"add_qkv_bias": True}


FAMILY = Family(
    name="qwen2_5_vl",
    title="Qwen2.5-VL",
    model_types=("qwen2_5_vl",),
    architecture="Qwen2_5_VLForConditionalGeneration",
    is_default=True,
    read_shape=shape.read_shape,
    # config.json allows 128000 positions, but the training and the model card end here.
    trained_positions=32768,
    presets=presets.PRESETS,
    tokens=SpecialTokens(
        start_of_turn="<|im_start|>",
        end_of_turn="<|im_end|>",
        end_of_text="<|endoftext|>",
        image="<|image_pad|>",
        video="<|video_pad|>",
        vision_start="<|vision_start|>",
        vision_end="<|vision_end|>",
    ),
    processor=ProcessorFiles(
        load_class=_load_processor_class,
        image_class_prefix="Qwen2VL",
        video_class_prefix="Qwen2VL",
        image_processor={
            "processor_class": "Qwen2_5_VLProcessor",
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
        renamed_types=("Qwen2_5_VLImageProcessor", "Qwen2_5_VLImageProcessorFast"),
        think_template=Path(__file__).with_name("chat_template.jinja"),
    ),
    positions=_positions,
    served_after_video=shape.SERVED_AFTER_VIDEO,
    image_grid=_image_grid,
    video_grid=_video_grid,
    weight_table=weights.TABLE,
    weight_sizes=weights.sizes,
    has_bridge_tower=True,
    decoder_options=_decoder_options,
    load_model_class=_load_model_class,
    load_rollout_class=_load_rollout_class,
    patch_forward=flops.patch_forward,
    tiny=tiny.TINY,
)
