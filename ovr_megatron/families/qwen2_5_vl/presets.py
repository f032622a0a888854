"""The sizes of the published Qwen2.5-VL models, from their ``config.json`` on Hugging Face.  No torch, no Megatron."""

from __future__ import annotations

# layers, width, feed-forward, heads, key-value heads, vocabulary, tied, feed-forward of the vision tower
_SIZES = {
    "3B": (36, 2048, 11008, 16, 2, 151936, True, 3420),
    "7B": (28, 3584, 18944, 28, 4, 152064, False, 3420),
    "32B": (64, 5120, 27648, 40, 8, 152064, False, 3456),
    "72B": (80, 8192, 29568, 64, 8, 152064, False, 3456),
}


def _config(
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    tied: bool,
    vision_ffn: int,
) -> dict[str, object]:
    """Return the flat layout of Transformers 4: sizes of the language model on the top level."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "max_position_embeddings": 128000,
        "max_window_layers": layers,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "sliding_window": 32768,
        "use_sliding_window": False,
        "use_cache": True,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "vocab_size": vocab,
        "vision_config": {
            "depth": 32,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "hidden_act": "silu",
            "hidden_size": 1280,
            "in_channels": 3,
            "in_chans": 3,
            "intermediate_size": vision_ffn,
            "num_heads": 16,
            "out_hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
        },
    }


PRESETS = {name: _config(*sizes) for name, sizes in _SIZES.items()}
