"""Features of the vision tower that the decoder's first layers add to their outputs (DeepStack, arXiv 2406.04334).

Shapes: F image features of a pack, n of them in this rank's rows, L layers that add features, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from ovr_megatron.model.segments import Segments
from ovr_megatron.runtime.device import send


@dataclass(frozen=True)
class LayerFeatures:
    """What the first layers add on this rank.

    Attributes:
        values: [L, n, D].
        rows: int64 [n], the rows of the hidden states that they are added to.
    """

    values: Tensor
    rows: Tensor


def layer_features(
    features: Tensor,
    layers: int,
    rows: Tensor,
    row_count: int,
    tp_group: torch.distributed.ProcessGroup | None,
) -> LayerFeatures:
    """Return the features of the first layers for this rank's rows.

    Args:
        features: [n, L D] of this context-parallel rank's rows, on the device.
        layers: L.
        rows: int64 [n] on the host, the rows of this context-parallel rank that they belong to.
        row_count: of this context-parallel rank.
        tp_group: the sequence-parallel group, which shares these rows; None: every rank has all of them.
    """
    values = features.unflatten(-1, (layers, -1))
    if tp_group is not None:
        # Each rank adds the features of its own rows alone, and the tower, which all of them compute, needs the
        # gradient of all.
        values = copy_to_tensor_model_parallel_region(values, group=tp_group)
        size = row_count // tp_group.size()
        first = tp_group.rank() * size
        (local,) = ((rows >= first) & (rows < first + size)).nonzero(as_tuple=True)
        values = values[send(local, features.device)]
        rows = rows[local] - first
    return LayerFeatures(values.transpose(0, 1), send(rows, features.device))


class FeatureLayer(TransformerLayer):
    """A decoder layer that adds features of the tower to its output, if it is one of the first.

    They come as ``context`` [L, n, D], which Megatron leaves to layers that attend to another sequence: as an argument
    of the layer they have a gradient where it is recomputed, too.  `Segments.feature_rows` has their rows.
    """

    def forward(self, *args: Any, context: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return hidden states [T, 1, D], and the features for the layers after this one."""
        hidden, _ = super().forward(*args, **kwargs)
        if context is None:
            return hidden, None
        index = self.layer_number - 1
        segments: Segments = kwargs["packed_seq_params"]
        assert segments.feature_rows is not None
        features = context[index].unsqueeze(1).to(hidden.dtype)
        hidden = hidden.index_add(0, segments.feature_rows, features)
        is_last = index + 1 == len(context)
        return hidden, None if is_last else context
