"""A vision-language model on Megatron's GPTModel: image features in the place of tokens, M-RoPE, one of two heads.

Shapes: T rows of a pack, D width, F image features, n scored rows (those whose label is not -100).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
from torch import Tensor

from ovr_megatron.config import LoraConfig, ParallelConfig
from ovr_megatron.data.packing import IGNORED, Pack
from ovr_megatron.families import ModelShape
from ovr_megatron.model.adapters import adapted_classes
from ovr_megatron.model.attention import rotary_table
from ovr_megatron.model.context import rank_rows, share_images
from ovr_megatron.model.heads import ValueHead, float_product, token_scores
from ovr_megatron.model.layer_features import FeatureLayer, LayerFeatures, layer_features
from ovr_megatron.model.layers import LayerClasses, layer_spec
from ovr_megatron.model.rope import inverse_frequencies
from ovr_megatron.model.scores import Scores
from ovr_megatron.model.segments import Segments
from ovr_megatron.runtime.device import send


class VisionLanguageModel(GPTModel, ABC):
    """One pipeline stage of a model, or one interleaved part of it, as a policy or a value network.

    A family's class adds `build_vision` and `rotary_rows`.

    Args:
        shape: sizes.
        config: `language_config`, one object for all parts of a rank.
        parallel: layout, checked by `check_layout`.
        pg_collection: its process groups.
        classes: of its layers' modules.
        critic: a value head in place of the language-model head.
        lora: adapters of its linear layers.
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
        lora: LoraConfig | None = None,
    ):
        lora = lora or LoraConfig()
        stage = pg_collection.pp.rank()
        stages = pg_collection.pp.size()
        pre_process = stage == 0 and part == 0
        post_process = stage == stages - 1 and part == parallel.vpp - 1
        vp_stage = part if parallel.vpp > 1 else None
        layer_count = get_num_layers_to_build(config, vp_stage, stage)
        adapted = adapted_classes(classes, shape, lora)
        # The layers that add features are in the first part, see `check_layout`.
        layer_class = FeatureLayer if pre_process and shape.vision.layer_features else TransformerLayer
        layer_specs = [layer_spec(config, True, adapted, layer_class)] * layer_count
        # Every rank holds the same number of rows: `_padding_rows` bans those beyond the vocabulary.
        rank_vocab = -(-shape.vocab // parallel.tp)
        super().__init__(
            config,
            TransformerBlockSubmodules(layer_specs=layer_specs, layer_norm=classes.norm),
            vocab_size=rank_vocab * parallel.tp,
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
            tower_classes = adapted_classes(classes, shape, lora, tower=True)
            self.vision = self.build_vision(shape, parallel, dtype, tower_classes)
        if post_process and critic:
            del self.output_layer
            self.value_head = ValueHead(shape.hidden, dtype, torch.cuda.current_device())
        self.shape = shape
        self.critic = critic
        self.has_adapters = lora.rank > 0
        frequencies, self.rotary_scaling = inverse_frequencies(shape)
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self.register_buffer("position_row", self.rotary_rows(shape), persistent=False)
        self.banned: Tensor
        self.register_buffer("banned", self._padding_rows(), persistent=False)
        self.temperature = 1.0

    @abstractmethod
    def build_vision(
        self,
        shape: ModelShape,
        parallel: ParallelConfig,
        dtype: torch.dtype,
        classes: LayerClasses,
    ) -> MegatronModule:
        """Return the vision tower on this rank: patches [P, patch_dim] and grids [images, 3] to features.

        Features are [F, D], and with ``shape.vision.layer_features`` [F, (1 + L) D]: those of the embedding and those
        of each of the L first layers.
        """

    @abstractmethod
    def rotary_rows(self, shape: ModelShape) -> Tensor:
        """Return for each rotary pair the row of the position ids that it turns by: int64 [head_dim / 2].

        The rows are time, height and width.
        """

    def _padding_rows(self) -> Tensor:
        """Return a mask, bool [V of this rank], of the rows that pad the vocabulary to a multiple of the ranks."""
        group = self.pg_collection.tp
        vocab = self.shape.vocab
        rows = -(-vocab // group.size())
        first = rows * group.rank()
        token_ids = torch.arange(first, first + rows)
        return token_ids >= vocab

    def sample_from(self, banned: Sequence[int], temperature: float) -> None:
        """Score by the distribution that a rollout samples from: no ``banned`` ids, logits over ``temperature``."""
        # Padding rows of the vocabulary stay banned: their logits would count in the softmax.
        padding = self._padding_rows()
        self.banned = padding.to(self.banned.device)
        row_count = len(self.banned)
        vocab_start = row_count * self.pg_collection.tp.rank()
        local_ids = []
        for token in banned:
            local_id = token - vocab_start
            if 0 <= local_id < row_count:
                local_ids.append(local_id)
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
        if logits:
            return self._logits(hidden)
        return self._score(hidden, pack, rows)

    def _rows(self, pack: Pack) -> Tensor:
        """Return the rows of the pack that this context-parallel rank holds, int64 [T / cp], on the host."""
        cp = self.pg_collection.cp
        bounds = pack.bounds.tolist()
        return rank_rows(bounds, cp.size(), cp.rank())

    def _decode(self, pack: Pack, rows: Tensor) -> Tensor:
        """Return hidden states [T / cp, 1, D] after this stage's layers (sequence-parallel: this rank's part)."""
        device = self.inv_freq.device
        positions = send(pack.position_ids[:, rows], device)
        angles = positions[self.position_row].t().float() * self.inv_freq
        # Without tails `Segments.build` takes the bounds themselves for the lengths.
        lengths = None if pack.cu_seqlens_padded is None else pack.cu_seqlens
        segments = Segments.build(
            pack.bounds,
            exact=False,
            device=device,
            cp_group=self.pg_collection.cp,
            lengths=lengths,
            prefix_of=pack.prefix_of,
        )
        hidden = None
        features = None
        if self.pre_process:
            hidden, features = self._embed(pack, rows)
        if features is not None:
            segments.feature_rows = features.rows
        return self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            context=None if features is None else features.values,
            rotary_pos_emb=rotary_table(angles, self.config.params_dtype, self.rotary_scaling),
            packed_seq_params=segments,
        )

    def _embed(self, pack: Pack, rows: Tensor) -> tuple[Tensor, LayerFeatures | None]:
        """Return token embeddings [T / cp, 1, D] with the image features in the rows of ``pack.placement``.

        Second come the features of the first layers; None in a pack without images, or where no layer has any.
        """
        device = self.inv_freq.device
        token_ids = send(pack.tokens[rows], device)
        hidden = self.embedding(input_ids=token_ids[None], position_ids=None)
        further = None
        if len(pack.placement):
            features = self._features(pack)
            # Indices are made on the host: a mask on the device would have to be waited for.
            local_rows = torch.full_like(pack.tokens, -1)
            local_rows[rows] = torch.arange(len(rows))
            feature_rows = local_rows[pack.placement]  # -1: another context-parallel rank holds the row
            is_local = feature_rows >= 0
            (local_features,) = is_local.nonzero(as_tuple=True)
            if len(local_features) < len(feature_rows):
                features = features[send(local_features, device)]
            row_of_feature = feature_rows[local_features]
            target_rows = send(row_of_feature, device)
            layers = self.shape.vision.layer_features
            if layers:
                features, further_features = features.split([self.shape.hidden, layers * self.shape.hidden], dim=-1)
                group = self.pg_collection.tp if self.config.sequence_parallel else None
                further = layer_features(further_features, layers, row_of_feature, len(rows), group)
            hidden = hidden.index_copy(0, target_rows, features[:, None].to(hidden.dtype))
        elif self.training and self._vision_trains():
            # Every rank takes part in the tower's gradient collectives, a pack without images too.
            blank_features = self.vision(*self._blank())
            hidden = hidden + 0.0 * blank_features.sum()
        if self.config.sequence_parallel:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(
                hidden,
                group=self.pg_collection.tp,
            )
        if self.has_adapters and torch.is_grad_enabled() and not hidden.requires_grad:
            # The embedding is frozen. A recomputed layer has a backward pass only if its input asks for a gradient.
            hidden.requires_grad_(True)
        return hidden, further

    def _vision_trains(self) -> bool:
        return any(parameter.requires_grad for parameter in self.vision.parameters())

    def _features(self, pack: Pack) -> Tensor:
        """Return features [F, D] of all images of the pack; context-parallel ranks each encode their share of them."""
        group = self.pg_collection.cp
        device = self.inv_freq.device
        if group.size() == 1:
            return self.vision(send(pack.patches, device), pack.grid_thw)
        patches = pack.grid_thw.prod(-1).tolist()
        shares = share_images(patches, group.size())
        unit = self.shape.vision.merge**2
        longest = 0
        for share in shares:
            rank_patches = sum(patches[image] for image in share)
            longest = max(longest, rank_patches // unit)
        local_images = shares[group.rank()]
        if local_images:
            patches_by_image = pack.patches.split(patches)
            local_patches = torch.cat([patches_by_image[image] for image in local_images])
            local_grids = pack.grid_thw[local_images]
            features = self.vision(send(local_patches, device), local_grids)
        else:  # every rank takes part in the tower's gradient collectives
            blank_features = self.vision(*self._blank())
            features = blank_features[:0]
        # The gather takes equally many rows of every rank.
        padding_rows = longest - len(features)
        features = F.pad(features, (0, 0, 0, padding_rows))
        gathered = tensor_parallel.gather_from_sequence_parallel_region(features, group=group)
        pack_order = self._feature_rows(patches, shares, longest)
        return gathered[send(pack_order, device)]

    def _feature_rows(
        self,
        patches: Sequence[int],
        shares: Sequence[Sequence[int]],
        width: int,
    ) -> Tensor:
        """Return for each feature of the pack its row in the ranks' features, each rank's padded to ``width``."""
        unit = self.shape.vision.merge**2
        rows: dict[int, Tensor] = {}
        for rank, share in enumerate(shares):
            start = rank * width
            for image in share:
                feature_count = patches[image] // unit
                end = start + feature_count
                rows[image] = torch.arange(start, end)
                start = end
        in_pack_order = [rows[image] for image in range(len(patches))]
        return torch.cat(in_pack_order)

    def _blank(self) -> tuple[Tensor, Tensor]:
        """Return the patches and the grid of a blank image of one feature."""
        vision = self.shape.vision
        patch_count = vision.merge * vision.merge
        patches = torch.zeros(patch_count, vision.patch_dim, device=self.inv_freq.device)
        grid = torch.tensor([[1, vision.merge, vision.merge]])
        return patches, grid

    def _gather_rows(self, hidden: Tensor) -> Tensor:
        """Return all rows [T, D] of a sequence-parallel group.

        The heads compute the same on every rank, so the backward pass does not sum a row's gradient over the ranks.
        """
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden,
                tensor_parallel_output_grad=False,
                group=self.pg_collection.tp,
            )
        return hidden[:, 0]

    def _head_weight(self) -> Tensor:
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def _score(self, hidden: Tensor, pack: Pack, rows: Tensor) -> Scores:
        is_labelled = pack.labels[rows] != IGNORED
        (labelled,) = is_labelled.nonzero(as_tuple=True)
        # Only the scored rows go through the head, which costs more than a layer.
        scored = self._gather_rows(hidden)[send(labelled, hidden.device)]
        scored_rows = rows[labelled]
        if self.critic:
            values = self.value_head(scored)
            return Scores(scored_rows, values=values)
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
        rows = self._gather_rows(hidden)
        local = float_product(rows, self._head_weight().t())
        full = tensor_parallel.gather_from_tensor_model_parallel_region(
            local,
            group=self.pg_collection.tp,
        )
        # Without the rows that pad the vocabulary, which `_padding_rows` bans from the scores.
        return full[:, : self.shape.vocab]
