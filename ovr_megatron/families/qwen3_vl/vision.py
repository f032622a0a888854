"""The vision tower of Qwen3-VL, made of Megatron layers.

Shapes: P patches of all images and frames of a pack, m merge size, F = P / m^2 features, D language width, L decoder
layers that features are added to.  Patches arrive as the image processor lays them out: the m x m patches of a feature
follow each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ovr_megatron.families.qwen3_vl.shape import DeepStackVisionShape
from ovr_megatron.model.attention import rotary_table
from ovr_megatron.model.layers import LayerClasses, layer_spec
from ovr_megatron.model.patch_merger import PatchMerger
from ovr_megatron.model.segments import Segments
from ovr_megatron.runtime.device import send


@dataclass(frozen=True)
class FrameLayout:
    """The patches of one frame, in processor order.

    Attributes:
        position: int64 [P, 2], height and width of each patch.
        corners: int64 [P, 4], the learned positions around each patch.
        shares: float32 [P, 4], the share that each of them has in the patch's own position.
    """

    position: np.ndarray
    corners: np.ndarray
    shares: np.ndarray


# The sizes of pictures come again from step to step, and nothing else decides on the layout.
@lru_cache(maxsize=1024)
def frame_layout(height: int, width: int, merge: int, side: int) -> FrameLayout:
    """Return the layout of a frame of ``height`` x ``width`` patches over ``side`` x ``side`` learned positions.

    The corners of the frame have the learned positions of the square's corners; between them the positions of a row and
    of a column are evenly spaced, and interpolated bilinearly.
    """
    row, column, inner_row, inner_column = np.meshgrid(
        np.arange(height // merge), np.arange(width // merge), np.arange(merge), np.arange(merge), indexing="ij"
    )
    patch_row = (row * merge + inner_row).ravel()
    patch_column = (column * merge + inner_column).ravel()
    top, bottom, down = _neighbours(patch_row, height, side)
    left, right, across = _neighbours(patch_column, width, side)
    up = 1 - down
    back = 1 - across
    return FrameLayout(
        position=np.stack((patch_row, patch_column), axis=-1),
        corners=np.stack((top * side + left, top * side + right, bottom * side + left, bottom * side + right), axis=-1),
        shares=np.stack((up * back, up * across, down * back, down * across), axis=-1),
    )


def _neighbours(index: np.ndarray, count: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for each ``index`` of ``count`` the learned positions before and after it, and the share of the latter."""
    # torch's own function in float32, as vLLM: rounded otherwise, a point just below a learned position would take its
    # share from another one.  Transformers has a closed form, equal but for the last bits.
    points = torch.linspace(0, side - 1, count, dtype=torch.float32).numpy()[index]
    before = points.astype(np.int64)
    after = np.minimum(before + 1, side - 1)
    return before, after, points - before.astype(np.float32)


class DeepStackMerger(PatchMerger):
    """The merger of the last block's output, and those of the blocks before it that have features for a decoder layer.

    The latter are parts of it: what freezes the merger freezes them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        merge: int,
        out_size: int,
        tp_group: torch.distributed.ProcessGroup,
        classes: LayerClasses,
        layer_features: int,
    ):
        super().__init__(config, merge, out_size, tp_group, classes)
        self.deepstack = torch.nn.ModuleList(
            PatchMerger(config, merge, out_size, tp_group, classes, norm_merged=True) for _ in range(layer_features)
        )


class DeepStackTower(MegatronModule):
    """The vision tower: learned positions, blocks that attend to whole frames, the merger and those of DeepStack.

    Layers, attention and mergers are sharded over the tensor-parallel group; embeddings are replicated.
    """

    def __init__(
        self,
        shape: DeepStackVisionShape,
        out_size: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        classes: LayerClasses,
    ):
        super().__init__(config=config)
        self.shape = shape
        device = torch.cuda.current_device()
        # Published as a convolution; its stride is its kernel, so that it is a product with each patch.
        self.patch_embed = torch.nn.Linear(shape.patch_dim, shape.hidden, dtype=config.params_dtype, device=device)
        # A patch has the weighted sum of the four learned positions around it.
        self.pos_embed = torch.nn.EmbeddingBag(
            shape.positions_side**2, shape.hidden, mode="sum", dtype=config.params_dtype, device=device
        )
        self.layers = torch.nn.ModuleList(
            build_module(
                layer_spec(config, causal=False, classes=classes),
                config=config,
                layer_number=i + 1,
                pg_collection=pg_collection,
            )
            for i in range(shape.depth)
        )
        self.merger = DeepStackMerger(config, shape.merge, out_size, pg_collection.tp, classes, shape.layer_features)
        head_dim = shape.hidden // shape.heads
        # Half of the columns turn by height and half by width.
        columns = head_dim // 2
        exponents = torch.arange(0, columns, 2, dtype=torch.float32) / columns
        # Computed, not a weight: neither checkpoints nor Hugging Face folders have it.
        self.register_buffer("inv_freq", 1.0 / 10000.0**exponents, persistent=False)

    def forward(self, patches: Tensor, grid_thw: Tensor) -> Tensor:
        """Return features [F, (1 + L) D] in the order of the images: of the embedding, then of each of the L layers.

        Args:
            patches: [P, patch_dim] on the device, in processor order, images one after the other.
            grid_thw: int64 [images, 3] on the host, frames, height and width in patches.
        """
        device = patches.device
        grids = grid_thw.tolist()
        layouts = [
            frame_layout(height, width, self.shape.merge, self.shape.positions_side) for _, height, width in grids
        ]
        frames = [grid[0] for grid in grids]
        positions = _per_frame([layout.position for layout in layouts], frames, device)
        angles = (positions[:, :, None].float() * self.inv_freq).flatten(1)
        table = rotary_table(angles, self.config.params_dtype)
        lengths = [len(layout.position) for layout in layouts]
        bounds = torch.tensor(np.cumsum([0, *np.repeat(lengths, frames)]), dtype=torch.int32)
        segments = Segments.build(bounds, exact=True, device=device)

        dtype = self.patch_embed.weight.dtype
        hidden = self.patch_embed(patches.to(dtype))
        corners = _per_frame([layout.corners for layout in layouts], frames, device)
        shares = _per_frame([layout.shares for layout in layouts], frames, device).to(dtype)
        # As a call of the module: with an overlapped gather its hook waits until its weights are there.
        hidden = hidden + self.pos_embed(corners, per_sample_weights=shares)
        hidden = hidden.unsqueeze(1)
        layer_features: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            hidden, _ = layer(hidden, attention_mask=None, rotary_pos_emb=table, packed_seq_params=segments)
            if index in self.shape.deepstack_blocks:
                merger = self.merger.deepstack[len(layer_features)]
                layer_features.append(merger(hidden))
        features = torch.cat((self.merger(hidden), *layer_features), dim=-1)
        return features.squeeze(1)


def _per_frame(arrays: Sequence[np.ndarray], frames: Sequence[int], device: torch.device) -> Tensor:
    """Concatenate one array per image to a tensor on the device, each repeated for its frames."""
    repeated = [np.tile(array, (count, 1)) for array, count in zip(arrays, frames, strict=True)]
    return send(torch.from_numpy(np.concatenate(repeated)), device)
