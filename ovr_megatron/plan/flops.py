"""FLOP of a pass through the model; a multiply and an add are two."""

from __future__ import annotations

from dataclasses import dataclass

from ovr_megatron.config import ModelConfig
from ovr_megatron.model.shape import ModelShape
from ovr_megatron.plan.workload import Workload

FORMULA = """\
FLOP of training = 3 x forward where a part trains (2 x where gradients only pass through, 1 x where none does)
  forward, a token: layers x [2 x D(Q + 2K) + 2 x QD + 6 x DF + 2 x Q x length]  + 2 x DV (policy's head)
  forward, a patch: depth x [8 x E^2 + 6 x EG + 4 x E x window] + 2 x E x pixels + (merger) 2 x M(M + D) / merge^2
  length = sum of squared document lengths / sum of lengths (causal: half of 4); window = the patches a patch sees
  MFU = this FLOP, recomputation not counted, over peak rate x GPUs x seconds"""


@dataclass(frozen=True)
class TokenFlops:
    """FLOP for each token of the training data: without gradients, in training, and computed again for it."""

    forward: float
    training: float
    again: float


def token_flops(shape: ModelShape, model: ModelConfig, load: Workload, critic: bool = False) -> TokenFlops:
    """FLOP a token by `FORMULA`; images count by the patches that ``load`` has for each of its tokens."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    perceptron = 6 * shape.hidden * shape.ffn
    attention = 2 * shape.hidden * (query + 2 * key) + 2 * query * shape.hidden + 2 * query * load.squares
    layers = shape.layers * (perceptron + attention)
    head = 2 * shape.hidden * (1 if critic else shape.vocab)
    tower, merger = (load.patches / load.tokens * n for n in patch_flops(shape))
    into_vision = bool(tower) and not (model.freeze_vision and model.freeze_merger)
    language = layers + head
    training = language * (2.0 if model.freeze_language and into_vision else 3.0)
    training += tower * (1 if model.freeze_vision else 3)
    training += merger * (3 if not model.freeze_merger else 1 if model.freeze_vision else 2)
    again = {"none": 0, "selective": shape.layers * perceptron, "full": layers}[model.recompute]
    return TokenFlops(language + tower + merger, training, again)


def patch_flops(shape: ModelShape) -> tuple[float, float]:
    """Forward FLOP of the tower and of the merger for each patch; full attention as if an image had 1,280 patches."""
    vision = shape.vision
    width, merged = vision.hidden, vision.hidden * vision.merge**2
    window = (vision.window // vision.patch) ** 2
    full = len([i for i in vision.full_attention_layers if i < vision.depth])
    seen = (vision.depth - full) * window + full * 1280
    tower = vision.depth * (8 * width**2 + 6 * width * vision.ffn) + 4 * width * seen + 2 * vision.patch_dim * width
    return tower, 2 * merged * (merged + shape.hidden) / vision.merge**2
