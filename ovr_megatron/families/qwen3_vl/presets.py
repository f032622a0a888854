"""The sizes of the published dense Qwen3-VL models, from their ``config.json`` on Hugging Face.  No torch, no Megatron.

The Instruct and the Thinking model of a size have the same.
"""

from __future__ import annotations

# layers, width, feed-forward, heads, tied, and of the vision tower: depth, width, feed-forward, DeepStack blocks
_SMALL_TOWER = (24, 1024, 4096, [5, 11, 17])
_LARGE_TOWER = (27, 1152, 4304, [8, 16, 24])
_SIZES = {
    "Qwen3-VL-2B": (28, 2048, 6144, 16, True, _SMALL_TOWER),
    "Qwen3-VL-4B": (36, 2560, 9728, 32, True, _SMALL_TOWER),
    "Qwen3-VL-8B": (36, 4096, 12288, 32, False, _LARGE_TOWER),
    "Qwen3-VL-32B": (64, 5120, 25600, 64, False, _LARGE_TOWER),
}


def _config(
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    tied: bool,
    tower: tuple[int, int, int, list[int]],
) -> dict[str, object]:
    depth, vision_hidden, vision_ffn, deepstack_blocks = tower
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "tie_word_embeddings": tied,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "dtype": "bfloat16",
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "initializer_range": 0.02,
            "intermediate_size": ffn,
            "max_position_embeddings": 262144,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "rope_theta": 5000000,
            "tie_word_embeddings": tied,
            "use_cache": True,
            "vocab_size": 151936,
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "deepstack_visual_indexes": deepstack_blocks,
            "depth": depth,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": vision_hidden,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": vision_ffn,
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": hidden,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }


PRESETS = {name: _config(*sizes) for name, sizes in _SIZES.items()}
