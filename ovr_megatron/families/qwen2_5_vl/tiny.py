"""Small random Qwen2.5-VLs: what `ovr_megatron.model.tiny` writes into their files."""

from __future__ import annotations

from collections.abc import Mapping

from ovr_megatron.families.tiny import TensorShapes, TinyModel, TinySizes

# In Qwen's order; those of the second group are added tokens but not special ones.
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
ADDED_TOKENS = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)
# A plain ChatML template in the manner of Qwen2.5-VL: the base model's own, without a thinking prefix.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif part.type == 'text' %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
_PREPROCESSOR = {
    "processor_class": "Qwen2_5_VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 3136,
    "max_pixels": 1003520,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def _config(
    sizes: TinySizes,
    ids: Mapping[str, int],
    tied: bool,
    std: float,
    dtype: str,
) -> dict[str, object]:
    """Return the flat layout of Transformers 4: sizes of the language model on the top level."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "initializer_range": std,
        "intermediate_size": sizes.ffn,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "max_position_embeddings": sizes.max_positions,
        "max_window_layers": sizes.layers,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": sizes.mrope_section},
        "sliding_window": sizes.max_positions,
        "use_sliding_window": False,
        "use_cache": True,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        # Like the published models: a multiple of 64, so some ids lie past the tokenizer.
        "vocab_size": (max(ids.values()) // 64 + 1) * 64,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": {
            "depth": sizes.vision_depth,
            "hidden_act": "silu",
            "hidden_size": sizes.vision_hidden,
            "intermediate_size": sizes.vision_ffn,
            "num_heads": sizes.vision_heads,
            "in_channels": 3,
            "in_chans": 3,
            "out_hidden_size": sizes.hidden,
            "patch_size": 14,
            "spatial_patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": sizes.window,
            # The other layers attend within windows: a small tower has both kinds.
            "fullatt_block_indexes": [sizes.vision_depth - 1],
            "initializer_range": std,
        },
    }


def _shapes(sizes: TinySizes, vocab: int, tied: bool) -> TensorShapes:
    """Yield Hugging Face parameter names with their shapes, in a fixed order."""
    width = sizes.vision_hidden
    ffn = sizes.vision_ffn
    yield "visual.patch_embed.proj.weight", (width, 3, 2, 14, 14)
    for i in range(sizes.vision_depth):
        block = f"visual.blocks.{i}"
        yield f"{block}.norm1.weight", (width,)
        yield f"{block}.norm2.weight", (width,)
        yield from _linear(f"{block}.attn.qkv", 3 * width, width)
        yield from _linear(f"{block}.attn.proj", width, width)
        yield from _linear(f"{block}.mlp.gate_proj", ffn, width)
        yield from _linear(f"{block}.mlp.up_proj", ffn, width)
        yield from _linear(f"{block}.mlp.down_proj", width, ffn)
    yield "visual.merger.ln_q.weight", (width,)
    yield from _linear("visual.merger.mlp.0", 4 * width, 4 * width)
    yield from _linear("visual.merger.mlp.2", sizes.hidden, 4 * width)

    hidden = sizes.hidden
    kv_width = sizes.kv_heads * (sizes.hidden // sizes.heads)
    yield "model.embed_tokens.weight", (vocab, hidden)
    for i in range(sizes.layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield from _linear(f"{layer}.self_attn.q_proj", hidden, hidden)
        yield from _linear(f"{layer}.self_attn.k_proj", kv_width, hidden)
        yield from _linear(f"{layer}.self_attn.v_proj", kv_width, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{layer}.mlp.gate_proj.weight", (sizes.ffn, hidden)
        yield f"{layer}.mlp.up_proj.weight", (sizes.ffn, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, sizes.ffn)
    yield "model.norm.weight", (hidden,)
    if not tied:
        yield "lm_head.weight", (vocab, hidden)


def _linear(name: str, rows: int, columns: int) -> TensorShapes:
    yield f"{name}.weight", (rows, columns)
    yield f"{name}.bias", (rows,)


TINY = TinyModel(
    config=_config,
    tensors=_shapes,
    preprocessor=_PREPROCESSOR,
    tokenizer_class="Qwen2Tokenizer",
    special_tokens=SPECIAL_TOKENS,
    added_tokens=ADDED_TOKENS,
    chat_template=CHAT_TEMPLATE,
)
