"""A small random Qwen2.5-VL in a Hugging Face folder: the model of the miniature and of the tests.

Nothing is downloaded.  The folder has all files of a real one (config, weights, byte-level tokenizer with
Qwen's special tokens, processor, chat template, generation config), so that Transformers, vLLM and this
package read it like one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ovr_megatron.model.tiny_sizes import TinySizes
from ovr_megatron.model.tiny_tokenizer import CHAT_TEMPLATE, CORPUS, write_tokenizer


def make_tiny_model(
    out: str | Path,
    *,
    tied: bool = True,
    seed: int = 0,
    sizes: TinySizes | None = None,
    corpus: Iterable[str] | None = None,
    perturb: bool = False,
    std: float = 0.04,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a random Qwen2.5-VL to the folder ``out`` and return its path.

    Args:
        out: Folder to create; files of the same names in it are replaced.
        tied: The output layer is the embedding (as in the 3B model) or has its own weight (7B).
        seed: Seed of the weights; the same arguments give the same bytes.
        sizes: Widths and depths; the miniature's by default.
        corpus: Texts that the byte-level BPE is trained on; default: a few lines with the puzzles' words.
        perturb: Move norms and biases off their trivial 1 and 0, so that a test sees each of them.
        std: Standard deviation of the matrices.
        dtype: Dtype of the stored weights.

    Raises:
        ValueError: sizes that do not divide.
    """
    sizes = sizes or TinySizes()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(out, CORPUS if corpus is None else corpus, sizes.bpe_vocab, sizes.max_positions)
    config = _config(sizes, ids, tied, std, dtype)
    _write_json(out / "config.json", config)
    _write_processor(out)
    _write_json(
        out / "generation_config.json",
        {
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "pad_token_id": ids["<|endoftext|>"],
            "do_sample": True,
            "temperature": 1.0,
        },
    )
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: _initial(name, shape, generator, std, perturb).to(dtype)
        for name, shape in _shapes(sizes, config["vocab_size"], tied)
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors makes it private
    return out


def _write_processor(out: Path) -> None:
    _write_json(
        out / "preprocessor_config.json",
        {
            "processor_class": "Qwen2_5_VLProcessor",
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": 3136,
            "max_pixels": 1003520,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
    )
    _write_json(out / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def _config(sizes: TinySizes, ids: dict[str, int], tied: bool, std: float, dtype: torch.dtype) -> dict[str, Any]:
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
        "torch_dtype": str(dtype).removeprefix("torch."),
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
            "fullatt_block_indexes": [sizes.vision_depth - 1],
            "initializer_range": std,
        },
    }


def _shapes(sizes: TinySizes, vocab: int, tied: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
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


def _linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, columns)
    yield f"{name}.bias", (rows,)


def _initial(name: str, shape: tuple[int, ...], generator: torch.Generator, std: float, perturb: bool) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return std * noise
    centre = 0.0 if name.endswith(".bias") else 1.0
    return centre + 0.1 * noise if perturb else torch.full(shape, centre)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
