"""The two losses as the engine wants them: sums over the scored rows of a pack, with what is to be logged."""

from __future__ import annotations

import torch
from torch import Tensor

from ovr_megatron.config import AlgorithmConfig
from ovr_megatron.data.packing import Pack
from ovr_megatron.engine import LossSum
from ovr_megatron.model.qwen25vl import Scores
from ovr_megatron.ppo.losses import kl_estimate, policy_loss, truncated_importance, value_loss
from ovr_megatron.ppo.mismatch import Mismatch


class PolicyObjective:
    """The clipped surrogate, with the divergence from a reference and the entropy where they are wanted.

    Reads a pack's ``advantages`` and ``rollout_logprobs``, and where they are there ``old_logprobs`` (else the step is
    strictly on-policy: the old log-probabilities are the current ones, detached), ``reference_logprobs``, ``weights``
    and ``modalities``.  ``mismatch`` counts the differences between old ones and the rollout engine's.
    """

    def __init__(self, config: AlgorithmConfig):
        self.config = config
        self.mismatch = Mismatch()

    def __call__(self, scores: Scores, pack: Pack) -> LossSum:
        """Loss of one pack."""
        config = self.config
        assert scores.logprobs is not None and scores.entropy is not None
        now, rollout = scores.logprobs.detach(), scores.beside(pack, "rollout_logprobs")
        old = scores.beside(pack, "old_logprobs") if "old_logprobs" in pack.extras else now
        high = config.clip_high or config.clip
        advantages = scores.beside(pack, "advantages")
        losses, clipped = policy_loss(scores.logprobs, old, advantages, config.clip, high)
        sums = {
            "entropy": scores.entropy.detach().sum(),
            "clip_fraction": clipped.float().sum(),
            "rollout_kl": kl_estimate(rollout, old, "k3").sum(),
        }
        if config.importance_cap:
            weight = truncated_importance(old, rollout, config.importance_cap)
            losses = losses * weight
            sums["importance"] = weight.sum()
        if "reference_logprobs" in pack.extras:
            divergence = kl_estimate(scores.logprobs, scores.beside(pack, "reference_logprobs"), config.kl_form)
            sums["reference_kl"] = divergence.detach().sum()
            if config.kl_in == "loss":
                losses = losses + config.kl_coefficient * divergence
        if config.entropy_bonus:
            losses = losses - config.entropy_bonus * scores.entropy
        if "modalities" in pack.extras:
            self.mismatch.add((old - rollout).abs(), scores.beside(pack, "modalities"))
        return weighed(losses, scores, pack, sums)


class ValueObjective:
    """Squared error to the returns; with ``value_clip``, Open-Reasoner-Zero's clipped form."""

    def __init__(self, config: AlgorithmConfig):
        self.config = config

    def __call__(self, scores: Scores, pack: Pack) -> LossSum:
        """Loss of one pack."""
        assert scores.values is not None
        losses = value_loss(
            scores.values, scores.beside(pack, "returns"), scores.beside(pack, "values"), self.config.value_clip
        )
        return weighed(losses, scores, pack, {})


def weighed(losses: Tensor, scores: Scores, pack: Pack, sums: dict[str, Tensor]) -> LossSum:
    """Sum of the tokens' losses, each times the pack's ``weights`` where it has some (`losses.token_weights`)."""
    weights = scores.beside(pack, "weights") if "weights" in pack.extras else torch.ones_like(losses)
    return LossSum((losses * weights).sum(), len(scores.rows), sums)
