"""FLOP of a pass through the model; a multiply and an add are two."""

from __future__ import annotations

from dataclasses import dataclass

from ovr_megatron.config import ModelConfig
from ovr_megatron.families import ModelShape, family_of
from ovr_megatron.model.flops import attention_forward, language_weights, training_passes
from ovr_megatron.plan.workload import Workload

FRAME = 1280  # patches of an image, for layers of full attention
FORMULA = """\
FLOP of training = 3 x forward where a part trains, 2 x where gradients only pass through (attention: 3 x), else 1 x
  forward, a token: layers x [2 x D(Q + 2K) + 2 x QD + 6 x DF + 2 x Q x length]  + 2 x DV (policy's head)
  forward, a patch: depth x [8 x E^2 + 6 x EG + 4 x E x window] + 2 x E x pixels + (merger) 2 x M(M + D) / merge^2
    4 x EG where a tower's MLP has no gate; a merger more for each layer that takes features
  length = sum of squared document lengths / sum of lengths (causal: half of 4); window = the patches a patch sees
  MFU = this FLOP, recomputation not counted, over peak rate x GPUs x seconds"""


@dataclass(frozen=True)
class TokenFlops:
    """FLOP for each token of the training data: without gradients, in training, and recomputed in training."""

    forward: float
    training: float
    recomputed: float


def token_flops(shape: ModelShape, model: ModelConfig, load: Workload, critic: bool = False) -> TokenFlops:
    """Return the FLOP of a token by `FORMULA`; images count by the patches that ``load`` has for each of its tokens."""
    family = family_of(shape)
    matrices = 2.0 * language_weights(shape, critic)
    attention = attention_forward(shape, load.attended_length)
    head = 2.0 * shape.hidden * (1 if critic else shape.vocab)
    mlps = 6.0 * shape.layers * shape.hidden * shape.ffn
    patches_per_token = load.patches / load.tokens
    tower_patch, merger_patch = family.patch_forward(shape, FRAME)
    tower = patches_per_token * tower_patch
    merger = patches_per_token * merger_patch

    # Gradients pass through a frozen language model in a pack without images, too: it has a blank one, see
    # `ovr_megatron.model.vision_language`.
    matrix_passes, tower_passes, merger_passes = training_passes(
        language_trains=model.trains_language,
        vision_trains=model.trains_vision,
        merger_trains=model.trains_merger,
        vision_adapters=model.adapts_vision,
    )
    training = matrices * matrix_passes + 3.0 * attention
    training += tower * tower_passes
    training += merger * merger_passes
    recomputed = {"none": 0.0, "selective": mlps, "full": matrices - head + attention}[model.recompute]
    return TokenFlops(matrices + attention + tower + merger, training, recomputed)
