"""Megatron's configurations of a model's layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import layers as parallel_layers
from megatron.core.transformer.transformer_config import TransformerConfig

from ovr_megatron.config import ModelConfig, ParallelConfig
from ovr_megatron.families import ModelShape, VisionShape, family_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def transformer_config(parallel: ParallelConfig, dtype: torch.dtype, **options: Any) -> TransformerConfig:
    """Return Megatron's configuration of a stack of layers; ``options`` are its sizes and what a family sets."""
    activation: dict[str, Any] = {
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "use_te_activation_func": True,  # the name notwithstanding: the layers' own module `SwiGLU`
    }
    return TransformerConfig(
        tensor_model_parallel_size=parallel.tp,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,  # weights are loaded
        calculate_per_token_loss=True,  # gradients are divided by the rows of the step, not of a micro-batch
        gradient_accumulation_fusion=parallel_layers._grad_accum_fusion_available,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        batch_p2p_sync=False,
        **(activation | options),
    )


def vision_config(vision: VisionShape, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
    """Return Megatron's configuration of a vision tower: no pipeline, no sequence parallelism, biases everywhere."""
    options: dict[str, Any] = {}
    if vision.has_layer_norm:
        options["normalization"] = "LayerNorm"
    if not vision.has_gate:
        gelu = partial(F.gelu, approximate="tanh")
        options |= {"gated_linear_unit": False, "activation_func": gelu, "use_te_activation_func": False}
    return transformer_config(
        parallel,
        dtype,
        num_layers=vision.depth,
        hidden_size=vision.hidden,
        ffn_hidden_size=vision.ffn,
        num_attention_heads=vision.heads,
        # Transformers has this number in the code of the towers, not in their configuration.
        layernorm_epsilon=1e-6,
        add_bias_linear=True,
        add_qkv_bias=True,
        **options,
    )


_FP8_RECIPES = {"delayed": "delayed", "current": "tensorwise", "block": "blockwise"}


def language_config(shape: ModelShape, parallel: ParallelConfig, model: ModelConfig) -> TransformerConfig:
    """Return Megatron's configuration of the language model, with the options of the model's family."""
    fp8: dict[str, object] = {}
    if model.fp8 != "none":
        fp8 = {
            "fp8": "hybrid",
            "fp8_recipe": _FP8_RECIPES[model.fp8],
            "first_last_layers_bf16": model.fp8_bf16_layers > 0,
            "num_layers_at_start_in_bf16": model.fp8_bf16_layers,
            "num_layers_at_end_in_bf16": model.fp8_bf16_layers,
        }
        if model.fp8 == "delayed":
            fp8 |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    recompute: dict[str, dict[str, object]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    return transformer_config(
        parallel,
        DTYPES[model.dtype],
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers or None,
        num_layers_in_last_pipeline_stage=parallel.last_stage_layers or None,
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sequence_parallel,
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        layernorm_epsilon=shape.norm_eps,
        add_bias_linear=False,
        # Interleaved stages send forwards and backwards to the same neighbour: only separate messages keep them apart.
        overlap_p2p_comm=parallel.vpp > 1,
        batch_p2p_comm=parallel.vpp == 1,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # variable_seq_lengths requires it, even without experts
        **family_of(shape).decoder_options(shape),
        **recompute[model.recompute],
        **fp8,
    )
