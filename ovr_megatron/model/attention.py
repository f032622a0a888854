"""Self-attention over packs: absolute rotary positions given from outside, documents kept apart by ``cu_seqlens``.

Shapes: T rows of the pack on this rank, N query heads and G key-value heads of this rank, H head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from ovr_megatron.model.segments import Segments


def rotary_table(angles: Tensor) -> Tensor:
    """Cosines and sines of ``angles`` [T, H/2] as one float32 tensor [T, 1, 1, 2H], rotate-half convention."""
    full = torch.cat((angles, angles), dim=-1)
    return torch.cat((full.cos(), full.sin()), dim=-1)[:, None, None]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Apply the rotary ``table`` [T, 1, 1, 2H] to ``x`` [T, 1, N, H], in float32."""
    cos, sin = table.chunk(2, dim=-1)
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class PackedSelfAttention(SelfAttention):
    """Megatron's self-attention with M-RoPE angles computed once per sample instead of from the pack's rows.

    Megatron-Core 0.16 takes rotary positions from the row number within the pack or document, which is wrong
    for three-row positions; the parameters and their sharding are the parent's.
    """

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor,
        packed_seq_params: Segments,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend within documents; ``hidden_states`` [T, 1, D] (sequence-parallel: this rank's rows)."""
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        query, key = rotate(query, rotary_pos_emb), rotate(key, rotary_pos_emb)
        context = self.core_attention(
            query.squeeze(1),
            key.squeeze(1),
            value.squeeze(1),
            None,
            attn_mask_type=self.attn_mask_type,
            packed_seq_params=packed_seq_params,
        )
        return self.linear_proj(context.reshape(context.size(0), 1, -1))


class PackedDotProductAttention(MegatronModule):
    """Scaled dot-product attention over the documents of a pack, without Transformer Engine.

    Documents of like length are attended as one batch.  Under a causal mask the padding at a document's end is
    never seen by its real rows, so no mask is ever built.
    """

    def __init__(self, config: Any, *, attn_mask_type: AttnMaskType, softmax_scale: float | None = None, **_: Any):
        super().__init__(config=config)
        self.causal = attn_mask_type == AttnMaskType.padding_causal
        self.scale = softmax_scale

    def forward(
        self,
        query_TNH: Tensor,
        key_TGH: Tensor,
        value_TGH: Tensor,
        attention_mask: None,
        *,
        attn_mask_type: AttnMaskType,
        packed_seq_params: Segments,
        attention_bias: None = None,
    ) -> Tensor:
        """Attention output [T, N * H]."""
        shared = query_TNH.size(1) // key_TGH.size(1)
        if shared > 1:
            key_TGH = key_TGH.repeat_interleave(shared, dim=1)
            value_TGH = value_TGH.repeat_interleave(shared, dim=1)
        parts = [
            self._attend(query_TNH, key_TGH, value_TGH, group.index, group.whole) for group in packed_seq_params.groups
        ]
        if packed_seq_params.inverse is None:
            return parts[0]
        return torch.cat(parts)[packed_seq_params.inverse]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, index: Tensor, whole: bool) -> Tensor:
        def batch(x: Tensor) -> Tensor:
            rows = x if whole else x[index.flatten()]
            return rows.view(*index.shape, *x.shape[1:]).transpose(1, 2)

        out = F.scaled_dot_product_attention(
            batch(query), batch(key), batch(value), is_causal=self.causal, scale=self.scale
        )
        return out.transpose(1, 2).flatten(0, 1).flatten(1)
