"""Qwen2.5-VL on Megatron's GPTModel: vision features spliced in, M-RoPE, a language-model or a value head.

Shapes: T rows of a pack, D width, F image features, n scored rows (those whose label is not -100).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ovr_megatron.config import ConfigError, ParallelConfig
from ovr_megatron.data.packing import IGNORED, Pack
from ovr_megatron.model.attention import rotary_table
from ovr_megatron.model.heads import token_scores
from ovr_megatron.model.layers import RMSNorm, layer_spec
from ovr_megatron.model.segments import Segments
from ovr_megatron.model.shape import ModelShape
from ovr_megatron.model.vision import VisionTower

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Scores:
    """What the last pipeline stage returns for the scored rows of a pack: all float32 [n].

    A policy fills ``logprobs`` and ``entropy``, a critic ``values``.
    """

    rows: Tensor
    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    values: Tensor | None = None


def check_layout(shape: ModelShape, parallel: ParallelConfig) -> None:
    """Refuse a tensor-parallel size that the model's heads do not allow."""
    tp = parallel.tp
    for count, what in (
        (shape.kv_heads, "key-value heads"),
        (shape.heads, "attention heads"),
        (shape.vision.heads, "vision heads"),
        (shape.ffn, "FFN columns"),
        (shape.vision.ffn, "vision FFN columns"),
    ):
        if count % tp:
            fits = max(n for n in range(1, tp) if not count % n)
            raise ConfigError(f"parallel.tp={tp} does not divide the model's {count} {what}; use at most tp={fits}")


def _transformer_config(parallel: ParallelConfig, dtype: torch.dtype, **sizes: Any) -> TransformerConfig:
    return TransformerConfig(
        tensor_model_parallel_size=parallel.tp,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_qkv_bias=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        batch_p2p_sync=False,
        **sizes,
    )


def language_config(
    shape: ModelShape, parallel: ParallelConfig, dtype: torch.dtype, recompute: bool
) -> TransformerConfig:
    """Megatron's configuration of the language model."""
    return _transformer_config(
        parallel,
        dtype,
        pipeline_model_parallel_size=parallel.pp,
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
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # asked for by variable_seq_lengths, even without experts
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
    )


def vision_config(shape: ModelShape, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's configuration of the vision tower: no pipeline, no sequence parallelism."""
    vision = shape.vision
    return _transformer_config(
        parallel,
        dtype,
        num_layers=vision.depth,
        hidden_size=vision.hidden,
        ffn_hidden_size=vision.ffn,
        num_attention_heads=vision.heads,
        layernorm_epsilon=1e-6,
        add_bias_linear=True,
    )


class Qwen25VL(GPTModel):
    """One pipeline stage of Qwen2.5-VL as a policy or, with ``critic``, as a value network."""

    def __init__(
        self,
        shape: ModelShape,
        parallel: ParallelConfig,
        dtype: torch.dtype,
        pg_collection: ProcessGroupCollection,
        critic: bool = False,
        pre_process: bool = True,
        post_process: bool = True,
        recompute: bool = False,
    ):
        check_layout(shape, parallel)
        config = language_config(shape, parallel, dtype, recompute)
        layers = get_num_layers_to_build(config, pp_rank=pg_collection.pp.rank())
        super().__init__(
            config,
            TransformerBlockSubmodules(layer_specs=[layer_spec(causal=True)] * layers, layer_norm=RMSNorm),
            vocab_size=-(-shape.vocab // parallel.tp) * parallel.tp,
            max_sequence_length=shape.max_positions,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=shape.tied and not critic,
            position_embedding_type="none",
            scatter_embedding_sequence_parallel=False,
            pg_collection=pg_collection,
        )
        self.shape, self.critic = shape, critic
        if pre_process:
            self.vision = VisionTower(
                shape.vision, shape.hidden, vision_config(shape, parallel, dtype), self.pg_collection
            )
        if post_process and critic:
            del self.output_layer
            device = torch.cuda.current_device()
            self.value_head = torch.nn.Linear(shape.hidden, 1, bias=False, dtype=dtype, device=device)
        exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
        self.register_buffer("inv_freq", 1.0 / shape.rope_theta**exponents, persistent=False)
        rows = torch.repeat_interleave(torch.arange(3), torch.tensor(shape.mrope_section))
        self.register_buffer("position_row", rows, persistent=False)
        self.banned: Tensor
        self.register_buffer("banned", self._padding_rows(), persistent=False)
        self.temperature = 1.0

    def _padding_rows(self) -> Tensor:
        """Bool [V of this rank]: rows that only exist to make the vocabulary divisible."""
        rows = -(-self.shape.vocab // self.pg_collection.tp.size())
        first = rows * self.pg_collection.tp.rank()
        return torch.arange(first, first + rows) >= self.shape.vocab

    def sample_from(self, banned: Sequence[int], temperature: float) -> None:
        """Score what a rollout samples from: ``banned`` ids excluded, logits divided by ``temperature``."""
        self.banned = self._padding_rows().to(self.banned.device)
        first = len(self.banned) * self.pg_collection.tp.rank()
        mine = [i - first for i in banned if first <= i < first + len(self.banned)]
        self.banned[mine] = True
        self.temperature = temperature

    def forward(self, pack: Pack) -> Tensor | Scores:  # type: ignore[override]
        """Scores of the rows that carry a label; on earlier pipeline stages the hidden states [T, 1, D]."""
        hidden = self._decode(pack)
        return self._score(hidden, pack) if self.post_process else hidden

    def _decode(self, pack: Pack) -> Tensor:
        """Hidden states [T, 1, D] after this stage's layers (sequence-parallel: this rank's rows)."""
        angles = pack.position_ids[self.position_row].t().float() * self.inv_freq
        return self.decoder(
            hidden_states=self._embed(pack) if self.pre_process else None,
            attention_mask=None,
            rotary_pos_emb=rotary_table(angles),
            packed_seq_params=Segments.build(pack.cu_seqlens, exact=False),
        )

    def _embed(self, pack: Pack) -> Tensor:
        """Token embeddings [T, 1, D] with the image features put where the sample recorded them."""
        hidden = self.embedding(input_ids=pack.tokens[None], position_ids=None)
        if len(pack.placement):
            features = self.vision(pack.patches, pack.grid_thw)
            hidden = hidden.index_copy(0, pack.placement, features[:, None].to(hidden.dtype))
        elif self.training and any(p.requires_grad for p in self.vision.parameters()):
            hidden = hidden + 0.0 * self._idle_vision(hidden)
        if self.config.sequence_parallel:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden, group=self.pg_collection.tp)
        return hidden

    def _idle_vision(self, like: Tensor) -> Tensor:
        """A blank image through the tower, so that every rank takes part in its gradient collectives."""
        merge = self.shape.vision.merge
        patches = like.new_zeros(merge * merge, self.shape.vision.patch_dim)
        grid = torch.tensor([[1, merge, merge]])
        return self.vision(patches, grid).sum()

    def _gather_rows(self, hidden: Tensor) -> Tensor:
        """All rows [T, D].  The heads compute the same on every rank, so a row's gradient is not summed again."""
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return hidden[:, 0]

    def _head_weight(self) -> Tensor:
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def _score(self, hidden: Tensor, pack: Pack) -> Scores:
        rows = (pack.labels != IGNORED).nonzero()[:, 0]
        scored = self._gather_rows(hidden)[rows]
        if self.critic:
            return Scores(rows, values=self.value_head(scored)[:, 0].float())
        logprobs, entropy = token_scores(
            scored, self._head_weight(), pack.labels[rows], self.banned, self.temperature, self.pg_collection.tp
        )
        return Scores(rows, logprobs=logprobs, entropy=entropy)

    def logits(self, pack: Pack) -> Tensor:
        """Logits [T, vocabulary] of every row on every rank; for verification, on one pipeline stage only."""
        local = self._gather_rows(self._decode(pack)) @ self._head_weight().t()
        full = tensor_parallel.gather_from_tensor_model_parallel_region(local, group=self.pg_collection.tp)
        return full[:, : self.shape.vocab]
