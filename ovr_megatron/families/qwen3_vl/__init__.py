"""Qwen3-VL, the dense models: what the rest of the code asks of it (`ovr_megatron.families`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovr_megatron.config import DataConfig
from ovr_megatron.families import Family, ModelShape
from ovr_megatron.families.assets import ProcessorFiles, SpecialTokens
from ovr_megatron.families.positions import Visual
from ovr_megatron.families.qwen3_vl import flops, presets, shape, tiny, weights

if TYPE_CHECKING:
    import numpy as np


# Transformers, Megatron and vLLM take seconds to import: each function imports its own when it is called.
def _load_processor_class() -> type[Any]:
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    return Qwen3VLProcessor


def _load_model_class() -> type[Any]:
    from ovr_megatron.families.qwen3_vl.model import Qwen3VL

    return Qwen3VL


def _load_rollout_class() -> type[Any]:
    from ovr_megatron.families.qwen3_vl.rollout import Qwen3VLRollout

    return Qwen3VLRollout


def _positions(segments: Sequence[int | Visual], sizes: ModelShape, after_video: str) -> np.ndarray:
    from ovr_megatron.families.qwen3_vl.positions import positions

    return positions(segments, sizes, after_video)


def _image_grid(width: int, height: int, sizes: ModelShape, config: DataConfig) -> Visual:
    from ovr_megatron.families.qwen3_vl.pixels import image_grid

    return image_grid(width, height, sizes, config)


def _video_grid(frames: int, width: int, height: int, fps: float, sizes: ModelShape, config: DataConfig) -> Visual:
    from ovr_megatron.families.qwen3_vl.pixels import video_grid

    return video_grid(frames, width, height, fps, sizes, config)


def _expand(visual: Visual, sizes: ModelShape, encode: Callable[[str], list[int]]) -> list[list[int] | Visual]:
    """Return each slice of a video as a picture with its own marks, after its time; an image as it is.

    The marks around the placeholder of the video stay: Transformers (from 5.10) and vLLM put the slices between them.
    """
    if visual.seconds is None:
        return [visual]
    _, height, width = visual.grid
    pieces: list[list[int] | Visual] = []
    text: list[int] = []  # between the slice before and this one
    for time in visual.times:
        text += [*encode(f"<{time:.1f} seconds>"), sizes.vision_start_token]
        pieces += [text, Visual((1, height, width))]
        text = [sizes.vision_end_token]
    return [*pieces, text]


def _decoder_options(sizes: ModelShape) -> Mapping[str, object]:
    return {"qk_layernorm": True}


FAMILY = Family(
    name="qwen3_vl",
    title="Qwen3-VL",
    model_types=("qwen3_vl",),
    architecture="Qwen3VLForConditionalGeneration",
    read_shape=shape.read_shape,
    trained_positions=262144,
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
        video_class_prefix="Qwen3VL",
        image_processor={
            "processor_class": "Qwen3VLProcessor",
            "image_processor_type": "Qwen2VLImageProcessor",
            "size": {"shortest_edge": 65536, "longest_edge": 16777216},
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
        renamed_types=(),
        think_template=Path(__file__).with_name("chat_template.jinja"),
    ),
    positions=_positions,
    expand=_expand,
    # Both rules are the same here, see `positions`.
    served_after_video="extent",
    image_grid=_image_grid,
    fewest_frames=2,
    video_grid=_video_grid,
    weight_table=weights.TABLE,
    weight_sizes=weights.sizes,
    weight_stacks=weights.stacks,
    has_module_names=True,
    decoder_options=_decoder_options,
    load_model_class=_load_model_class,
    load_rollout_class=_load_rollout_class,
    patch_forward=flops.patch_forward,
    tiny=tiny.TINY,
)
