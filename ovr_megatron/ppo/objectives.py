"""The two losses as the engine wants them: sums over the scored rows of a pack, with what is to be logged."""

from __future__ import annotations

import torch

from ovr_megatron.config import AlgorithmConfig
from ovr_megatron.data.packing import Pack
from ovr_megatron.engine import LossSum
from ovr_megatron.model.qwen25vl import Scores
from ovr_megatron.ppo import maths
from ovr_megatron.ppo.batch import scored


class PolicyObjective:
    """The clipped surrogate, strictly on-policy: the old log-probabilities are the current ones, detached.

    Beside it, the difference to the log-probabilities that the rollout engine reported is measured:
    ``largest`` is its maximum over the packs seen by this rank.
    """

    def __init__(self, config: AlgorithmConfig):
        self.config = config
        self.largest = 0.0

    def __call__(self, scores: Scores, pack: Pack) -> LossSum:
        """Loss of one pack; reads its arrays ``advantages`` and ``rollout_logprobs``."""
        assert scores.logprobs is not None and scores.entropy is not None
        now = scores.logprobs.detach()
        losses, clipped = maths.policy_loss(scores.logprobs, now, scored(scores, pack, "advantages"), self.config.clip)
        mismatch = (now - scored(scores, pack, "rollout_logprobs")).abs()
        if len(mismatch):  # a context-parallel rank may hold no scored row of a pack
            self.largest = max(self.largest, float(mismatch.max()))
        sums = {
            "entropy": scores.entropy.detach().sum(),
            "clip_fraction": clipped.float().sum(),
            "mismatch_mean": mismatch.sum(),
        }
        return reduced(losses.sum(), len(scores.rows), sums, self.config.reduction)


class ValueObjective:
    """Squared error to the returns; with ``value_clip``, Open-Reasoner-Zero's clipped form."""

    def __init__(self, config: AlgorithmConfig):
        self.config = config

    def __call__(self, scores: Scores, pack: Pack) -> LossSum:
        """Loss of one pack; reads its arrays ``returns`` and ``values``."""
        assert scores.values is not None
        losses = maths.value_loss(
            scores.values, scored(scores, pack, "returns"), scored(scores, pack, "values"), self.config.value_clip
        )
        return reduced(losses.sum(), len(scores.rows), {}, self.config.reduction)


def reduced(total: torch.Tensor, rows: int, sums: dict[str, torch.Tensor], reduction: str) -> LossSum:
    """``token``: every token of the step weighs the same; ``pack``: first the mean of a pack, as Open-Reasoner-Zero."""
    if reduction == "token":
        return LossSum(total, rows, sums)
    return LossSum(total / rows, 1, {name: value / rows for name, value in sums.items()})
