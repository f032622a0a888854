"""Qwen2.5-VL on Megatron's GPTModel: image features in the place of tokens, M-RoPE, a language-model or value head.

Shapes: T rows of a pack, D width, F image features, n scored rows (those whose label is not -100).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import layers as parallel_layers
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from ovr_megatron.config import ConfigError, ModelConfig, ParallelConfig
from ovr_megatron.data.packing import IGNORED, Pack
from ovr_megatron.model.attention import rotary_table
from ovr_megatron.model.context import rank_rows, share_images
from ovr_megatron.model.heads import ValueHead, float_product, token_scores
from ovr_megatron.model.layers import LayerClasses, layer_spec
from ovr_megatron.model.rope import inverse_frequencies
from ovr_megatron.model.segments import Segments
from ovr_megatron.model.shape import ModelShape
from ovr_megatron.model.vision import VisionTower
from ovr_megatron.runtime.device import send

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Scores:
    """The last pipeline stage's output for the scored rows of a pack: all float32 [n].

    ``rows`` int64 [n], on the host, are their rows in the pack; a context-parallel rank has only its own.  A policy
    fills ``logprobs`` and ``entropy``, a critic ``values``.
    """

    rows: Tensor
    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    values: Tensor | None = None

    def beside(self, pack: Pack, name: str) -> Tensor:
        """Return the pack's array ``name`` at these rows [n], on the device of the scores."""
        scores = self.logprobs if self.logprobs is not None else self.values
        assert scores is not None
        return send(pack.extras[name][self.rows], scores.device)


def check_layout(shape: ModelShape, parallel: ParallelConfig, fp8: bool = False) -> None:
    """Refuse a layout that the model's sizes do not allow, before anything is allocated.

    8-bit matrix products want both sizes of a rank's weight to be multiples of 16.

    Raises:
        ConfigError: names the values and the nearest that fit.
    """
    tp = parallel.tp
    counts = {
        "key-value heads": shape.kv_heads,
        "attention heads": shape.heads,
        "vision heads": shape.vision.heads,
        "FFN columns": shape.ffn,
        "vision FFN columns": shape.vision.ffn,
    }
    for name, count in counts.items():
        if count % tp:
            largest = max(size for size in range(1, tp) if math.gcd(*counts.values()) % size == 0)
            raise ConfigError(f"parallel.tp={tp} does not divide the model's {count} {name}; use at most tp={largest}")
    _check_stages(shape.layers, parallel)
    if fp8:
        _check_fp8_sizes(shape, tp)


def _check_fp8_sizes(shape: ModelShape, tp: int) -> None:
    sizes = {
        "width": shape.hidden,
        "FFN columns a rank": shape.ffn // tp,
        "query columns a rank": shape.heads * shape.head_dim // tp,
        "key columns a rank": shape.kv_heads * shape.head_dim // tp,
    }
    for name, size in sizes.items():
        if size % 16:
            smaller = [divisor for divisor in range(1, tp) if not tp % divisor and size * tp // divisor % 16 == 0]
            remedy = f"use tp={smaller[-1]} or model.fp8=none" if smaller else "use model.fp8=none"
            raise ConfigError(f"model.fp8 with parallel.tp={tp}: {name} = {size}, not a multiple of 16; {remedy}")


def _check_stages(layers: int, parallel: ParallelConfig) -> None:
    """Refuse stages and interleaved parts that the model's ``layers`` do not divide over."""
    first = parallel.first_stage_layers
    last = parallel.last_stage_layers
    uneven = [count for count in (first, last) if count]
    even_layers = layers - sum(uneven)
    even_stages = parallel.pp - len(uneven)
    settings = f"parallel.pp={parallel.pp}, parallel.vpp={parallel.vpp}"
    if uneven:
        settings += f" with {first or '-'} first and {last or '-'} last layers"
    if even_stages == 0 and even_layers:
        raise ConfigError(
            f"{settings}: these stages hold {sum(uneven)} layers and the model has {layers}; make them its sum"
        )
    if even_stages and (even_layers < even_stages or even_layers % (even_stages * parallel.vpp)):
        pp_sizes = [size for size in range(1, layers + 1) if not layers % (size * parallel.vpp)]
        remedy = f"without uneven stages pp can be {', '.join(map(str, pp_sizes))}" if pp_sizes else "lower vpp"
        raise ConfigError(
            f"{settings}: {even_layers} of the model's {layers} layers do not divide over {even_stages} stages x "
            f"{parallel.vpp}; {remedy}"
        )
    for count in uneven:
        if count % parallel.vpp:
            raise ConfigError(f"{settings}: {count} layers do not divide by vpp; use a multiple of {parallel.vpp}")


# A rank's rows must be a multiple of this for an FP8 recipe's matrix products: 16 for their operands, and full blocks
# for block scaling.  Transformer Engine gathers the input of a sequence-parallel layer in 8 bits only where every rank
# has full blocks (`Float8BlockQuantizer.is_quantizable`); before 2.14 it refused others, now it gathers 16 bits.
_FP8_ROWS = {"none": 1, "delayed": 16, "current": 16, "block": 128}


def alignment(parallel: ParallelConfig, fp8: str = "none") -> tuple[int, int]:
    """Return what the rows of every document, and of every pack, must be a multiple of.

    Context parallelism cuts a document into two chunks a rank; all ranks of a sequence-parallel group hold equally
    many rows; 8-bit matrix products need a multiple of rows that follows from the recipe.

    Args:
        parallel: the model's layout.
        fp8: ``model.fp8``, the scaling recipe.
    """
    document = 2 * parallel.cp if parallel.cp > 1 else 1
    ranks = parallel.cp * (parallel.tp if parallel.sequence_parallel else 1)
    return document, math.lcm(document, ranks * _FP8_ROWS[fp8])


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
        perform_initialization=False,  # weights are loaded
        calculate_per_token_loss=True,  # gradients are divided by the rows of the step, not of a micro-batch
        gradient_accumulation_fusion=parallel_layers._grad_accum_fusion_available,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        use_te_activation_func=True,  # the name notwithstanding: the layers' own module `SwiGLU`
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        batch_p2p_sync=False,
        **sizes,
    )


_FP8_RECIPES = {"delayed": "delayed", "current": "tensorwise", "block": "blockwise"}


def language_config(shape: ModelShape, parallel: ParallelConfig, model: ModelConfig) -> TransformerConfig:
    """Return Megatron's configuration of the language model."""
    fp8: dict[str, Any] = {}
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
    recompute: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    return _transformer_config(
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
        **recompute[model.recompute],
        **fp8,
    )


def vision_config(shape: ModelShape, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
    """Return Megatron's configuration of the vision tower: no pipeline, no sequence parallelism."""
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
    """One pipeline stage of Qwen2.5-VL, or one interleaved part of it, as a policy or a value network.

    Args:
        shape: sizes.
        config: `language_config`, one object for all parts of a rank.
        parallel: layout, checked by `check_layout`.
        pg_collection: its process groups.
        classes: of its layers' modules.
        critic: a value head in place of the language-model head.
        part: index of the interleaved part of this stage, below ``parallel.vpp``.
    """

    def __init__(
        self,
        shape: ModelShape,
        config: TransformerConfig,
        parallel: ParallelConfig,
        pg_collection: ProcessGroupCollection,
        classes: LayerClasses,
        critic: bool = False,
        part: int = 0,
    ):
        stage = pg_collection.pp.rank()
        stages = pg_collection.pp.size()
        pre_process = stage == 0 and part == 0
        post_process = stage == stages - 1 and part == parallel.vpp - 1
        vp_stage = part if parallel.vpp > 1 else None
        layers = get_num_layers_to_build(config, vp_stage, stage)
        super().__init__(
            config,
            TransformerBlockSubmodules(layer_specs=[layer_spec(True, classes)] * layers, layer_norm=classes.norm),
            vocab_size=-(-shape.vocab // parallel.tp) * parallel.tp,
            max_sequence_length=shape.max_positions,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=shape.tied and not critic,
            position_embedding_type="none",  # M-RoPE's angles are passed to the layers
            scatter_embedding_sequence_parallel=False,  # image features are put in first, see `_embed`
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        self.first_layer = get_transformer_layer_offset(config, vp_stage, stage)
        dtype = config.params_dtype
        if pre_process:
            self.vision = VisionTower(
                shape.vision, shape.hidden, vision_config(shape, parallel, dtype), self.pg_collection, classes
            )
        if post_process and critic:
            del self.output_layer
            self.value_head = ValueHead(shape.hidden, dtype, torch.cuda.current_device())
        self.shape = shape
        self.critic = critic
        frequencies, self.rotary_scaling = inverse_frequencies(shape)
        self.register_buffer("inv_freq", frequencies, persistent=False)
        # For each rotary pair the row of the position ids that it rotates by: time, height or width.
        rows = torch.repeat_interleave(torch.arange(3), torch.tensor(shape.mrope_section))
        self.register_buffer("position_row", rows, persistent=False)
        self.banned: Tensor
        self.register_buffer("banned", self._padding_rows(), persistent=False)
        self.temperature = 1.0

    def _padding_rows(self) -> Tensor:
        """Return a mask, bool [V of this rank], of the rows that pad the vocabulary to a multiple of the ranks."""
        rows = -(-self.shape.vocab // self.pg_collection.tp.size())
        first = rows * self.pg_collection.tp.rank()
        return torch.arange(first, first + rows) >= self.shape.vocab

    def sample_from(self, banned: Sequence[int], temperature: float) -> None:
        """Score by the distribution that a rollout samples from: no ``banned`` ids, logits over ``temperature``."""
        self.banned = self._padding_rows().to(self.banned.device)
        vocab_start = len(self.banned) * self.pg_collection.tp.rank()
        vocab_end = vocab_start + len(self.banned)
        local_ids = [token - vocab_start for token in banned if vocab_start <= token < vocab_end]
        self.banned[local_ids] = True
        self.temperature = temperature

    def forward(self, pack: Pack, logits: bool = False) -> Tensor | Scores:
        """Return scores of this rank's rows that carry a label; on earlier pipeline stages hidden states.

        Args:
            pack: full documents on the host, the same on every tensor-, context- and pipeline-parallel rank, aligned
                to `alignment`.  Indices are computed there: nothing waits for the device.
            logits: for verification, return the logits [T / cp, vocabulary] of this rank's rows instead of scores.

        Returns:
            `Scores`, or hidden states [T / cp, 1, D] (sequence-parallel: of this rank's part of the rows).
        """
        rows = self._rows(pack)
        hidden = self._decode(pack, rows)
        if not self.post_process:
            return hidden
        return self._logits(hidden) if logits else self._score(hidden, pack, rows)

    def _rows(self, pack: Pack) -> Tensor:
        """Return the rows of the pack that this context-parallel rank holds, int64 [T / cp], on the host."""
        cp = self.pg_collection.cp
        return rank_rows(pack.bounds.tolist(), cp.size(), cp.rank())

    def _decode(self, pack: Pack, rows: Tensor) -> Tensor:
        """Return hidden states [T / cp, 1, D] after this stage's layers (sequence-parallel: this rank's part)."""
        positions = send(pack.position_ids[:, rows], self.inv_freq.device)
        angles = positions[self.position_row].t().float() * self.inv_freq
        segments = Segments.build(
            pack.bounds,
            exact=False,
            device=self.inv_freq.device,
            cp_group=self.pg_collection.cp,
            lengths=None if pack.cu_seqlens_padded is None else pack.cu_seqlens,
        )
        return self.decoder(
            hidden_states=self._embed(pack, rows) if self.pre_process else None,
            attention_mask=None,
            rotary_pos_emb=rotary_table(angles, self.config.params_dtype, self.rotary_scaling),
            packed_seq_params=segments,
        )

    def _embed(self, pack: Pack, rows: Tensor) -> Tensor:
        """Return token embeddings [T / cp, 1, D] with the image features in the rows of ``pack.placement``."""
        device = self.inv_freq.device
        hidden = self.embedding(input_ids=send(pack.tokens[rows], device)[None], position_ids=None)
        if len(pack.placement):
            features = self._features(pack)
            local_rows = torch.full_like(pack.tokens, -1)
            local_rows[rows] = torch.arange(len(rows))
            feature_rows = local_rows[pack.placement]  # -1: another context-parallel rank holds the row
            (local_features,) = (feature_rows >= 0).nonzero(as_tuple=True)
            if len(local_features) < len(feature_rows):
                features = features[send(local_features, device)]
            target_rows = send(feature_rows[local_features], device)
            hidden = hidden.index_copy(0, target_rows, features[:, None].to(hidden.dtype))
        elif self.training and any(p.requires_grad for p in self.vision.parameters()):
            # Every rank takes part in the tower's gradient collectives, a pack without images too.
            hidden = hidden + 0.0 * self.vision(*self._blank()).sum()
        if self.config.sequence_parallel:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden, group=self.pg_collection.tp)
        return hidden

    def _features(self, pack: Pack) -> Tensor:
        """Return features [F, D] of all images of the pack; context-parallel ranks each encode their share of them."""
        group = self.pg_collection.cp
        device = self.inv_freq.device
        if group.size() == 1:
            return self.vision(send(pack.patches, device), pack.grid_thw)
        patches = pack.grid_thw.prod(-1).tolist()
        shares = share_images(patches, group.size())
        unit = self.shape.vision.merge**2
        rank_patches = [sum(patches[image] for image in share) for share in shares]
        longest = max(rank_patches) // unit
        local_images = shares[group.rank()]
        if local_images:
            patches_by_image = pack.patches.split(patches)
            local_patches = torch.cat([patches_by_image[image] for image in local_images])
            features = self.vision(send(local_patches, device), pack.grid_thw[local_images])
        else:  # every rank takes part in the tower's gradient collectives
            features = self.vision(*self._blank())[:0]
        # The gather takes equally many rows of every rank.
        features = F.pad(features, (0, 0, 0, longest - len(features)))
        gathered = tensor_parallel.gather_from_sequence_parallel_region(features, group=group)
        return gathered[send(self._feature_rows(patches, shares, longest), device)]

    def _feature_rows(self, patches: Sequence[int], shares: Sequence[Sequence[int]], width: int) -> Tensor:
        """Return for each feature of the pack its row in the ranks' features, each rank's padded to ``width``."""
        unit = self.shape.vision.merge**2
        rows: dict[int, Tensor] = {}
        for rank, share in enumerate(shares):
            start = rank * width
            for image in share:
                end = start + patches[image] // unit
                rows[image] = torch.arange(start, end)
                start = end
        return torch.cat([rows[image] for image in range(len(patches))])

    def _blank(self) -> tuple[Tensor, Tensor]:
        """Return the patches and the grid of a blank image of one feature."""
        merge = self.shape.vision.merge
        patches = torch.zeros(merge * merge, self.shape.vision.patch_dim, device=self.inv_freq.device)
        return patches, torch.tensor([[1, merge, merge]])

    def _gather_rows(self, hidden: Tensor) -> Tensor:
        """Return all rows [T, D] of a sequence-parallel group.

        The heads compute the same on every rank, so the backward pass does not sum a row's gradient over the ranks.
        """
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return hidden[:, 0]

    def _head_weight(self) -> Tensor:
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def _score(self, hidden: Tensor, pack: Pack, rows: Tensor) -> Scores:
        (labelled,) = (pack.labels[rows] != IGNORED).nonzero(as_tuple=True)
        scored = self._gather_rows(hidden)[send(labelled, hidden.device)]
        scored_rows = rows[labelled]
        if self.critic:
            return Scores(scored_rows, values=self.value_head(scored))
        # The head's weight is used without the layer's forward: its hooks wait for the weight's all-gather, if any.
        for hook in self.output_layer._forward_pre_hooks.values():
            hook(self.output_layer, ())
        logprobs, entropy = token_scores(
            scored,
            self._head_weight(),
            send(pack.labels[scored_rows], hidden.device),
            self.banned,
            self.temperature,
            self.pg_collection.tp,
        )
        return Scores(scored_rows, logprobs=logprobs, entropy=entropy)

    def _logits(self, hidden: Tensor) -> Tensor:
        local = float_product(self._gather_rows(hidden), self._head_weight().t())
        full = tensor_parallel.gather_from_tensor_model_parallel_region(local, group=self.pg_collection.tp)
        return full[:, : self.shape.vocab]
