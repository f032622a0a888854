"""The merger of a vision tower: blocks of patches to features of the language model.

Shapes: P patches, m merge size, F = P / m^2 features, D language width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ovr_megatron.model.layers import LayerClasses


class PatchMerger(MegatronModule):
    """Norm, then a two-layer MLP that maps each m x m block of patches to the language model's width.

    Args:
        config: of the tower's layers.
        merge: m.
        out_size: D.
        tp_group: ranks that the MLP is sharded over.
        classes: of the tower's modules.
        norm_merged: norm a block as a whole rather than each of its patches.
    """

    def __init__(
        self,
        config: TransformerConfig,
        merge: int,
        out_size: int,
        tp_group: torch.distributed.ProcessGroup,
        classes: LayerClasses,
        norm_merged: bool = False,
    ):
        super().__init__(config=config)
        self.width = config.hidden_size * merge * merge
        self.norm_width = self.width if norm_merged else config.hidden_size
        self.norm = classes.norm(config, self.norm_width, eps=config.layernorm_epsilon)
        self.linear_fc1 = ColumnParallelLinear(
            self.width,
            self.width,
            config=config,
            init_method=config.init_method,
            skip_bias_add=False,
            tp_group=tp_group,
        )
        self.linear_fc2 = RowParallelLinear(
            self.width,
            out_size,
            config=config,
            init_method=config.init_method,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=tp_group,
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Return features [F, 1, D] of ``hidden`` [P, 1, width of the tower]."""
        normed = self.norm(hidden.view(-1, 1, self.norm_width))
        blocks = normed.view(-1, 1, self.width)
        inner, _ = self.linear_fc1(blocks)
        inner = F.gelu(inner)
        features, _ = self.linear_fc2(inner)
        return features
