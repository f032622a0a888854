"""Small random Qwen3-VLs: what `ovr_megatron.model.tiny` writes into their files."""

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
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)
# A plain ChatML template in the manner of the Instruct models, which add no system message of their own.
CHAT_TEMPLATE = """\
{%- for message in messages %}
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
_PIXELS = {
    "processor_class": "Qwen3VLProcessor",
    "size": {"shortest_edge": 4096, "longest_edge": 1003520},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
_PREPROCESSOR = {**_PIXELS, "image_processor_type": "Qwen2VLImageProcessor"}
_VIDEO_PREPROCESSOR = {**_PIXELS, "video_processor_type": "Qwen3VLVideoProcessor"}
_POSITIONS_SIDE = 7  # odd and small: the grids of tests lie between its points, and beyond its size


def _head_dim(sizes: TinySizes) -> int:
    # As in the published models, the heads together are wider than the model.
    return 2 * sizes.hidden // sizes.heads


def _deepstack_blocks(sizes: TinySizes) -> list[int]:
    """Return the first and the last block of the tower, at most as many as the language model has layers."""
    blocks = sorted({0, sizes.vision_depth - 1})
    return blocks[: sizes.layers]


def _config(
    sizes: TinySizes,
    ids: Mapping[str, int],
    tied: bool,
    std: float,
    dtype: str,
) -> dict[str, object]:
    """Return the layout of the published models: the language model in ``text_config``."""
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": tied,
        "dtype": dtype,
        "text_config": _text_config(sizes, ids, tied, std, dtype),
        "vision_config": _vision_config(sizes, std),
    }


def _text_config(sizes: TinySizes, ids: Mapping[str, int], tied: bool, std: float, dtype: str) -> dict[str, object]:
    pairs = _head_dim(sizes) // 2
    # In the published ratio of 6 : 5 : 5.
    side = 5 * pairs // 16
    section = [pairs - 2 * side, side, side]
    return {
        "model_type": "qwen3_vl_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "dtype": dtype,
        "head_dim": _head_dim(sizes),
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "initializer_range": std,
        "intermediate_size": sizes.ffn,
        "max_position_embeddings": sizes.max_positions,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": section, "rope_type": "default"},
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "use_cache": True,
        # Like the published models: a multiple of 64, so some ids lie past the tokenizer.
        "vocab_size": (max(ids.values()) // 64 + 1) * 64,
    }


def _vision_config(sizes: TinySizes, std: float) -> dict[str, object]:
    return {
        "model_type": "qwen3_vl",
        "deepstack_visual_indexes": _deepstack_blocks(sizes),
        "depth": sizes.vision_depth,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": sizes.vision_hidden,
        "in_channels": 3,
        "initializer_range": std,
        "intermediate_size": sizes.vision_ffn,
        "num_heads": sizes.vision_heads,
        "num_position_embeddings": _POSITIONS_SIDE**2,
        "out_hidden_size": sizes.hidden,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }


def _tensors(sizes: TinySizes, vocab: int, tied: bool) -> TensorShapes:
    """Yield Hugging Face parameter names with their shapes, in a fixed order."""
    yield from _tower(sizes)
    hidden = sizes.hidden
    head_dim = _head_dim(sizes)
    query_width = sizes.heads * head_dim
    key_width = sizes.kv_heads * head_dim
    language = "model.language_model"
    yield f"{language}.embed_tokens.weight", (vocab, hidden)
    for i in range(sizes.layers):
        layer = f"{language}.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield f"{layer}.self_attn.q_proj.weight", (query_width, hidden)
        yield f"{layer}.self_attn.k_proj.weight", (key_width, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (key_width, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, query_width)
        yield f"{layer}.self_attn.q_norm.weight", (head_dim,)
        yield f"{layer}.self_attn.k_norm.weight", (head_dim,)
        yield f"{layer}.mlp.gate_proj.weight", (sizes.ffn, hidden)
        yield f"{layer}.mlp.up_proj.weight", (sizes.ffn, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, sizes.ffn)
    yield f"{language}.norm.weight", (hidden,)
    if not tied:
        yield "lm_head.weight", (vocab, hidden)


def _tower(sizes: TinySizes) -> TensorShapes:
    width = sizes.vision_hidden
    tower = "model.visual"
    yield f"{tower}.patch_embed.proj.weight", (width, 3, 2, 16, 16)
    yield f"{tower}.patch_embed.proj.bias", (width,)
    yield f"{tower}.pos_embed.weight", (_POSITIONS_SIDE**2, width)
    for i in range(sizes.vision_depth):
        block = f"{tower}.blocks.{i}"
        yield from _with_bias(f"{block}.norm1", width)
        yield from _with_bias(f"{block}.norm2", width)
        yield from _with_bias(f"{block}.attn.qkv", 3 * width, width)
        yield from _with_bias(f"{block}.attn.proj", width, width)
        yield from _with_bias(f"{block}.mlp.linear_fc1", sizes.vision_ffn, width)
        yield from _with_bias(f"{block}.mlp.linear_fc2", width, sizes.vision_ffn)
    merged_width = 4 * width
    mergers = {f"{tower}.merger": width}
    for i in range(len(_deepstack_blocks(sizes))):
        mergers[f"{tower}.deepstack_merger_list.{i}"] = merged_width
    for merger, norm_width in mergers.items():
        yield from _with_bias(f"{merger}.norm", norm_width)
        yield from _with_bias(f"{merger}.linear_fc1", merged_width, merged_width)
        yield from _with_bias(f"{merger}.linear_fc2", sizes.hidden, merged_width)


def _with_bias(name: str, *size: int) -> TensorShapes:
    """Yield a weight of this size and its bias, of the first dimension."""
    yield f"{name}.weight", size
    yield f"{name}.bias", size[:1]


TINY = TinyModel(
    config=_config,
    tensors=_tensors,
    preprocessor=_PREPROCESSOR,
    tokenizer_class="Qwen2Tokenizer",
    special_tokens=SPECIAL_TOKENS,
    added_tokens=ADDED_TOKENS,
    chat_template=CHAT_TEMPLATE,
    video_preprocessor=_VIDEO_PREPROCESSOR,
)
