"""The vision tower of Qwen2.5-VL, made of Megatron layers.

Shapes: P patches of all images and frames of a pack, m merge size, F = P / m^2 features, D language width.
Patches arrive as the image processor lays them out: the m x m patches of a feature follow each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ovr_megatron.families.qwen2_5_vl.shape import WindowedVisionShape
from ovr_megatron.model.attention import rotary_table
from ovr_megatron.model.layers import LayerClasses, layer_spec
from ovr_megatron.model.patch_merger import PatchMerger
from ovr_megatron.model.segments import Segments
from ovr_megatron.runtime.device import send


@dataclass(frozen=True)
class GridLayout:
    """The order of the patches of one image or video.

    Attributes:
        order: int64 [P], for each row in window order its row in processor order.
        feature_order: int64 [F], the same for merged features.
        position: int64 [P, 2], height and width of each patch, in window order.
        window_lengths: patches of each window.
        frame_lengths: patches of each frame.
    """

    order: np.ndarray
    feature_order: np.ndarray
    position: np.ndarray
    window_lengths: tuple[int, ...]
    frame_lengths: tuple[int, ...]


# The sizes of pictures come again from step to step, and nothing else decides on the layout.
@lru_cache(maxsize=1024)
def grid_layout(grid: tuple[int, int, int], merge: int, window: int) -> GridLayout:
    """Return the layout of a ``grid`` (frames, height, width in patches); ``window`` is counted in features."""
    frames, height, width = grid
    frame, row, column = np.meshgrid(
        np.arange(frames), np.arange(height // merge), np.arange(width // merge), indexing="ij"
    )
    # Rounded up: the windows at the right and lower edge may be smaller.
    windows_wide = -(-(width // merge) // window)
    windows_high = -(-(height // merge) // window)
    window_row = frame * windows_high + row // window
    window_index = (window_row * windows_wide + column // window).ravel()
    # Stable: the features of a window keep the order of their rows.
    feature_order = np.argsort(window_index, kind="stable")
    _, features_per_window = np.unique(window_index, return_counts=True)

    unit = merge * merge
    inner_row, inner_column = np.divmod(np.arange(unit), merge)
    patch_row = row.reshape(-1, 1) * merge + inner_row
    patch_column = column.reshape(-1, 1) * merge + inner_column
    position = np.stack((patch_row, patch_column), axis=-1)
    return GridLayout(
        order=(feature_order[:, None] * unit + np.arange(unit)).ravel(),
        feature_order=feature_order,
        position=position[feature_order].reshape(-1, 2),
        window_lengths=tuple(int(count) * unit for count in features_per_window),
        frame_lengths=(height * width,) * frames,
    )


def _bounds(lengths_by_image: Iterable[Sequence[int]]) -> Tensor:
    """Return the bounds, int32 on the host, of segments of these lengths, one image after the other."""
    lengths = chain.from_iterable(lengths_by_image)
    return torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)


class VisionTower(MegatronModule):
    """The vision tower: window attention, full attention in some layers, and the merger to language features.

    Layers, attention and merger are sharded over the tensor-parallel group; the patch embedding is replicated.
    """

    def __init__(
        self,
        shape: WindowedVisionShape,
        out_size: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        classes: LayerClasses,
    ):
        super().__init__(config=config)
        self.shape = shape
        # Published as a convolution; its stride is its kernel, so that it is a product with each patch.
        self.patch_embed = torch.nn.Linear(
            shape.patch_dim,
            shape.hidden,
            bias=False,
            dtype=config.params_dtype,
            device=torch.cuda.current_device(),
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
        self.merger = PatchMerger(config, shape.merge, out_size, pg_collection.tp, classes)
        head_dim = shape.hidden // shape.heads
        # Half of the columns turn by height and half by width.
        columns = head_dim // 2
        exponents = torch.arange(0, columns, 2, dtype=torch.float32) / columns
        # Computed, not a weight: neither checkpoints nor Hugging Face folders have it.
        self.register_buffer("inv_freq", 1.0 / 10000.0**exponents, persistent=False)

    def forward(self, patches: Tensor, grid_thw: Tensor) -> Tensor:
        """Return features [F, D] in the order of the images.

        Args:
            patches: [P, patch_dim] on the device, in processor order, images one after the other.
            grid_thw: int64 [images, 3] on the host, frames, height and width in patches.
        """
        device = patches.device
        window = self.shape.window // self.shape.merge // self.shape.patch
        layouts = [grid_layout(tuple(grid), self.shape.merge, window) for grid in grid_thw.tolist()]
        order, feature_order = _concatenate(layouts)
        host_positions = np.concatenate([layout.position for layout in layouts])
        positions = send(torch.from_numpy(host_positions), device)
        angles = (positions[:, :, None].float() * self.inv_freq).flatten(1)
        table = rotary_table(angles, self.config.params_dtype)
        # Full attention sees one frame, window attention one window.
        window_bounds = _bounds(layout.window_lengths for layout in layouts)
        frame_bounds = _bounds(layout.frame_lengths for layout in layouts)
        windows = Segments.build(window_bounds, exact=True, device=device)
        frames = Segments.build(frame_bounds, exact=True, device=device)

        hidden = self.patch_embed(patches.to(self.patch_embed.weight.dtype))
        hidden = hidden[send(order, device)].unsqueeze(1)
        for index, layer in enumerate(self.layers):
            segments = frames if index in self.shape.full_attention_layers else windows
            hidden, _ = layer(hidden, attention_mask=None, rotary_pos_emb=table, packed_seq_params=segments)
        features = self.merger(hidden).squeeze(1)
        # The inverse of the window order.
        restored = torch.empty_like(feature_order)
        restored[feature_order] = torch.arange(len(feature_order))
        return features[send(restored, device)]


def _concatenate(layouts: list[GridLayout]) -> tuple[Tensor, Tensor]:
    """Concatenate the orders of all grids of a pack to two index tensors [P] and [F]."""
    patch_orders = []
    feature_orders = []
    patches = 0  # of the grids before
    features = 0
    for layout in layouts:
        patch_orders.append(layout.order + patches)
        feature_orders.append(layout.feature_order + features)
        patches += len(layout.order)
        features += len(layout.feature_order)
    return torch.from_numpy(np.concatenate(patch_orders)), torch.from_numpy(np.concatenate(feature_orders))
