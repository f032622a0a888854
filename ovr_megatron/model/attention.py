"""Self-attention over packs: the caller gives the rotary positions, and ``cu_seqlens`` separates the documents.

Shapes: T rows of the pack on this rank, N query heads and G key-value heads of this rank, H head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from ovr_megatron.model import kernels
from ovr_megatron.model.segments import DocumentGroup, DocumentRun, Grouping, Rows, Segments, SharedPrompt


def rotary_table(angles: Tensor, dtype: torch.dtype = torch.float32, scaling: float = 1.0) -> Tensor:
    """Return cosines and sines of ``angles`` [T, H/2] as one float32 tensor [T, 1, 1, 2H], rotate-half convention.

    Args:
        angles: float32 [T, H/2].
        dtype: of the parameters.  The table is rounded to it, as vLLM stores it (`RotaryEmbeddingBase`) and, for the
            language model, Transformers: a model is trained with the cosines that it is served with.
        scaling: factor of cosines and sines, before they are rounded.
    """
    full = torch.cat((angles, angles), dim=-1)
    table = torch.cat((full.cos(), full.sin()), dim=-1)[:, None, None]
    table = table * scaling
    return table.to(dtype).float()


def rotate(query: Tensor, key: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Apply the rotary ``table`` [T, 1, 1, 2H] to ``query`` [T, 1, N, H] and ``key`` [T, 1, G, H], in float32."""
    return _Rotation.apply(query, key, table)


class _Rotation(torch.autograd.Function):
    """Rotation of the pairs (x_i, x_{i + H/2}); its backward is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(table)  # a rotation is linear: its backward needs no input
        turned_query = _turn(query, table, 1.0)
        turned_key = _turn(key, table, 1.0)
        return turned_query, turned_key

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (table,) = ctx.saved_tensors
        grad_query, grad_key = grads
        d_query = _turn(grad_query, table, -1.0)
        d_key = _turn(grad_key, table, -1.0)
        return d_query, d_key, None


def _turn(x: Tensor, table: Tensor, sign: float) -> Tensor:
    """Return ``x`` rotated by the angles of the table, for a ``sign`` of -1 by the opposite ones."""
    if x.is_cuda:
        return kernels.rotate(x, table, sign)
    half = x.size(-1) // 2
    cos = table[..., :half]
    sin = table[..., 2 * half : 3 * half]
    first, second = x.float().chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    # Both halves are computed where they belong: a concatenation would copy the tensor once more.
    out_first = out[..., :half]
    torch.mul(first, cos, out=out_first)
    out_first.addcmul_(second, sin, value=-sign)
    out_second = out[..., half:]
    torch.mul(second, cos, out=out_second)
    out_second.addcmul_(first, sin, value=sign)
    return out.to(x.dtype)


class PackedSelfAttention(SelfAttention):
    """Megatron's self-attention with M-RoPE angles computed once per sample instead of from the pack's rows.

    Megatron-Core 0.16 takes rotary positions from the row number within the pack or document, which is wrong
    for three-row positions; the parameters and their sharding are the parent's.
    """

    def forward(
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
        query, key = rotate(query, key, rotary_pos_emb)
        context = self.core_attention(
            query.squeeze(1),
            key.squeeze(1),
            value.squeeze(1),
            None,
            attn_mask_type=self.attn_mask_type,
            packed_seq_params=packed_seq_params,
        )
        row_count = context.size(0)
        rows = context.reshape(row_count, 1, -1)
        return self.linear_proj(rows)


class PackedDotProductAttention(MegatronModule):
    """Scaled dot-product attention over the documents of a pack, without Transformer Engine.

    Neighbouring documents of one length are attended as a view of the pack, short ones of like length as one batch.
    Under a causal mask the padding at a document's end is never seen by its real rows, so no mask is ever built.
    Under context parallelism keys and values of all ranks are gathered; queries stay where they are.
    """

    def __init__(
        self,
        config: Any,
        *,
        attn_mask_type: AttnMaskType,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ):
        super().__init__(config=config)
        self.causal = attn_mask_type == AttnMaskType.padding_causal
        self.scale = softmax_scale
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None

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
        """Return the attention output [T, N * H] of this rank's T rows."""
        if self.cp_group is not None:
            # One collective for keys and values; its backward pass reduces and scatters their gradients.
            gathered = gather_from_sequence_parallel_region(
                torch.cat((key_TGH, value_TGH), 1),
                group=self.cp_group,
            )
            key_TGH, value_TGH = gathered.chunk(2, dim=1)
        queries_per_key = query_TNH.size(1) // key_TGH.size(1)
        # torch's kernels for a GPU want equal heads.
        if queries_per_key > 1 and query_TNH.is_cuda:
            key_TGH = key_TGH.repeat_interleave(queries_per_key, dim=1)
            value_TGH = value_TGH.repeat_interleave(queries_per_key, dim=1)
        grouping = packed_seq_params.grouping
        # On a GPU without shared prompts torch chooses the kernel (`attend`).
        if self.cp_group is None and (grouping.prompts or not query_TNH.is_cuda):
            out = _PackAttention.apply(query_TNH, key_TGH, value_TGH, grouping, self.causal, self.scale)
            return out.flatten(1)
        return attend_groups(query_TNH, key_TGH, value_TGH, grouping, self.causal, self.scale)


def attend_groups(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grouping: Grouping,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """Return the attention output [T, N * H] of the groups of a pack, each by the kernel that torch chooses.

    Shapes are those of `PackedDotProductAttention`; `Grouping.prompts` are left out.
    """
    parts = []
    for group in grouping.groups:
        batches = _batches(query, key, value, group)
        out = attend(*batches, causal, scale)
        parts.append(_rows(out).flatten(1))
    if len(parts) == 1 and grouping.inverse is None:
        return parts[0]
    outputs = torch.cat(parts)
    return outputs if grouping.inverse is None else outputs[grouping.inverse]


def _batch(x: Tensor, rows: Rows) -> Tensor:
    """Return ``rows`` of ``x`` [T, N, ...] as [B, N, L, ...], of a run as a view."""
    if isinstance(rows, DocumentRun):
        batched = x[rows.first : rows.end].view(rows.documents, rows.length, *x.shape[1:])
    else:
        batched = x[rows.flatten()].view(*rows.shape, *x.shape[1:])
    return batched.transpose(1, 2)


def _batches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: DocumentGroup | SharedPrompt,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the queries, keys and values of a group or of a shared prompt, as `_batch` does."""
    queries = _batch(query, group.queries)
    keys = _batch(key, group.keys)
    values = _batch(value, group.keys)
    return queries, keys, values


def _rows(x: Tensor) -> Tensor:
    """Return ``x`` [B, N, L, ...] as rows [B * L, N, ...], the inverse of `_batch`."""
    return x.transpose(1, 2).flatten(0, 1)


def _put(out: Tensor, rows: Rows, x: Tensor) -> None:
    """Write ``x`` [B, N, L, ...] to ``rows`` of ``out`` [T, N, ...]."""
    if isinstance(rows, DocumentRun):
        _batch(out, rows).copy_(x)
    else:
        out.index_copy_(0, rows.flatten(), _rows(x))


def _join(parts: Sequence[Tensor], groups: Sequence[DocumentGroup], row_count: int) -> Tensor:
    """Return the outputs of ``groups``, [B, N, L, ...] each, as the rows [T, N, ...] of the pack."""
    if len(groups) == 1 and groups[0].padding is None:
        return _rows(parts[0])
    # One more row than the pack has: outputs of padding are written there.
    first = parts[0]
    heads = first.size(1)
    trailing = first.shape[3:]
    out = first.new_empty((row_count + 1, heads, *trailing))
    for part, group in zip(parts, groups, strict=True):
        _put(out, group.output_rows, part)
    return out[:row_count]


def _add(out: Tensor, rows: Rows, x: Tensor) -> None:
    """Add ``x`` [B, N, L, ...] to ``rows`` of ``out`` [T, N, ...], in which no row is twice."""
    if isinstance(rows, DocumentRun):
        _batch(out, rows).add_(x)
    else:
        out[rows.flatten()] += _rows(x)


class _PackAttention(torch.autograd.Function):
    """Attention within each document of a pack, and from documents to the prompt that they share.

    A prompt's keys and values are read for all of its documents at once, where a batch of documents would need a copy
    for each.  Own and shared part are merged as in `_PrefixAttention`.

    Without context parallelism every row of the pack is a query of one group, and a key of the same one.  So the
    backward pass writes each gradient once; autograd would add them row by row.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grouping: Grouping,
        causal: bool,
        scale: float | None,
    ) -> Tensor:
        outputs = []
        norms = []
        for group in grouping.groups:
            batches = _batches(query, key, value, group)
            group_out, group_norm = _flash(*batches, causal, scale)
            outputs.append(group_out)
            norms.append(group_norm)
        out = _join(outputs, grouping.groups, query.size(0))
        norm = _join(norms, grouping.groups, query.size(0))
        for prompt in grouping.prompts:
            batches = _batches(query, key, value, prompt)
            shared_out, shared_norm = _flash(*batches, False, scale)
            own_out = _batch(out, prompt.queries)
            own_norm = _batch(norm, prompt.queries)
            merged_out, merged_norm = _merge(own_out, own_norm, shared_out, shared_norm)
            _put(out, prompt.queries, merged_out)
            _put(norm, prompt.queries, merged_norm)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, norm)
        ctx.grouping = grouping
        ctx.causal = causal
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, out, norm = ctx.saved_tensors
        grouping = ctx.grouping
        grad = grad.contiguous()
        group_grads = []
        for group in grouping.groups:
            group_norm = _batch(norm, group.queries)
            if group.padding is not None:
                # Padding has the gradient of row 0: without a share in the softmax it passes none of it on.
                group_norm = group_norm.masked_fill(group.padding[:, None], float("inf"))
            own_grads = _flash_backward(
                _batch(key, group.keys),
                _batch(value, group.keys),
                ctx.causal,
                _batch(query, group.queries),
                _batch(out, group.queries),
                group_norm.contiguous(),
                _batch(grad, group.queries),
                ctx.scale,
            )
            group_grads.append(own_grads)
        query_parts, key_parts, value_parts = zip(*group_grads, strict=True)
        row_count = query.size(0)
        d_query = _join(query_parts, grouping.groups, row_count)
        d_key = _join(key_parts, grouping.groups, row_count)
        d_value = _join(value_parts, grouping.groups, row_count)
        for prompt in grouping.prompts:
            shared_d_query, shared_d_key, shared_d_value = _flash_backward(
                _batch(key, prompt.keys),
                _batch(value, prompt.keys),
                False,
                _batch(query, prompt.queries),
                _batch(out, prompt.queries),
                _batch(norm, prompt.queries).contiguous(),
                _batch(grad, prompt.queries),
                ctx.scale,
            )
            _add(d_query, prompt.queries, shared_d_query)
            _add(d_key, prompt.keys, shared_d_key)
            _add(d_value, prompt.keys, shared_d_value)
        return d_query, d_key, d_value, None, None, None


def _merge(out: Tensor, norm: Tensor, other_out: Tensor, other_norm: Tensor) -> tuple[Tensor, Tensor]:
    """Return output [..., H] and log-sum-exp [...] of attention over the keys of both parts, from those of each."""
    # A part's share of the softmax is e^(its log-sum-exp - the merged one), at most 1: nothing overflows.
    merged_norm = torch.logaddexp(norm, other_norm)
    share = (norm - merged_norm).exp()
    other_share = (other_norm - merged_norm).exp()
    merged_out = out * share[..., None]
    merged_out.addcmul_(other_out, other_share[..., None])
    return merged_out, merged_norm


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    scale: float | None = None,
) -> Tensor:
    """Return the attention output [B, N, L, H] of ``query`` [B, N, L, H] over ``key`` and ``value`` [B, N, K, H].

    Causal: the last query sees all K keys, the one before it all but the last, and so on.  No mask is built.  On a CPU
    ``key`` and ``value`` may have fewer heads, each shared by neighbouring query heads.
    """
    if causal and query.size(2) < key.size(2):
        # torch's own mask would begin at the first key: query i would see the keys up to i.
        return _PrefixAttention.apply(query, key, value, scale)
    shares_keys = query.size(1) > key.size(1)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        is_causal=causal,
        scale=scale,
        enable_gqa=shares_keys,
    )


class _PrefixAttention(torch.autograd.Function):
    """Causal attention of the last L of K rows: all of the K - L before them, and causally among themselves.

    The two parts are merged by their log-sum-exp [B, N, L]; the backward of each then needs only the merged output
    and log-sum-exp, as in ring attention.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        prefix_key, causal_key = _split_rows(key, query)
        prefix_value, causal_value = _split_rows(value, query)
        prefix_out, prefix_norm = _flash(query, prefix_key, prefix_value, False, scale)
        causal_out, causal_norm = _flash(query, causal_key, causal_value, True, scale)
        out, norm = _merge(prefix_out, prefix_norm, causal_out, causal_norm)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, norm)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, norm = ctx.saved_tensors
        prefix_key, causal_key = _split_rows(key, query)
        prefix_value, causal_value = _split_rows(value, query)
        shared = (query, out, norm, grad.contiguous(), ctx.scale)
        prefix_grads = _flash_backward(prefix_key, prefix_value, False, *shared)
        causal_grads = _flash_backward(causal_key, causal_value, True, *shared)
        d_query_prefix, d_key_prefix, d_value_prefix = prefix_grads
        d_query_causal, d_key_causal, d_value_causal = causal_grads
        d_key = torch.cat((d_key_prefix, d_key_causal), dim=2)
        d_value = torch.cat((d_value_prefix, d_value_causal), dim=2)
        d_query = d_query_prefix + d_query_causal
        return d_query, d_key, d_value, None


def _split_rows(keys: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Return views of ``keys`` [B, N, K, H]: the K - L rows before those of the L queries, and the last L."""
    prefix_rows = keys.size(2) - query.size(2)
    return keys[:, :, :prefix_rows], keys[:, :, prefix_rows:]


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Return the output in float32 and the log-sum-exp [B, N, L], by torch's fused kernel."""
    if query.is_cuda:
        out, norm, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, causal, scale=scale
        )
        rows = query.size(2)
        return out.float(), norm[..., :rows]  # the kernel pads its log-sum-exp, see `_flash_backward`
    out, norm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
    return out.float(), norm


def _flash_backward(
    key: Tensor,
    value: Tensor,
    causal: bool,
    query: Tensor,
    out: Tensor,
    norm: Tensor,
    grad: Tensor,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value from the merged output and log-sum-exp."""
    if query.is_cuda:
        # Without dropout the kernel draws nothing, and takes a seed and an offset all the same.
        seed = torch.zeros((), dtype=torch.int64, device=query.device)
        rows = query.size(2)
        width = -(-rows // 32) * 32  # the kernel reads its log-sum-exp in rows of this multiple
        padded = F.pad(norm, (0, width - rows), value=float("inf"))
        needs_grad = [True, True, True, False]  # of query, key, value and bias
        grads = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            grad, query, key, value, None, out, padded, seed, seed, 0.0, needs_grad, causal, scale=scale
        )
        d_query, d_key, d_value, _ = grads
        return d_query, d_key, d_value
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, norm, 0.0, causal, scale=scale
    )
