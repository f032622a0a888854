"""FLOP of a pass through the model; a multiply and an add are two."""

from __future__ import annotations

from dataclasses import dataclass

from ovr_megatron.config import ModelConfig
from ovr_megatron.model.flops import attention_forward, language_weights, patch_forward
from ovr_megatron.model.shape import ModelShape
from ovr_megatron.plan.workload import Workload

FRAME = 1280  # patches of an image, for layers of full attention
FORMULA = """\
FLOP of training = 3 x forward where a part trains, 2 x where gradients only pass through (attention: 3 x), else 1 x
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
    matrices = 2.0 * language_weights(shape, critic)
    attention = attention_forward(shape, load.squares)
    head = 2.0 * shape.hidden * (1 if critic else shape.vocab)
    perceptrons = 6.0 * shape.layers * shape.hidden * shape.ffn
    tower, merger = (load.patches / load.tokens * n for n in patch_forward(shape, FRAME))
    into_vision = bool(tower) and not (model.freeze_vision and model.freeze_merger)
    training = matrices * (2.0 if model.freeze_language and into_vision else 3.0) + 3.0 * attention
    training += tower * (1 if model.freeze_vision else 3)
    training += merger * (3 if not model.freeze_merger else 1 if model.freeze_vision else 2)
    again = {"none": 0.0, "selective": perceptrons, "full": matrices - head + attention}[model.recompute]
    return TokenFlops(matrices + attention + tower + merger, training, again)
