"""Losses of policy and critic for the engine: sums over the scored rows of a pack, with sums to log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ovr_megatron.config import AlgorithmConfig
from ovr_megatron.data.packing import Pack
from ovr_megatron.engine import LossSum
from ovr_megatron.model.scores import Scores
from ovr_megatron.ppo.corrections import Correction, CorrectionInput, correction_bounds, find_correction
from ovr_megatron.ppo.losses import ResponseSegments, find_loss, kl_estimate, value_loss
from ovr_megatron.ppo.mismatch import Mismatch
from ovr_megatron.ppo.sources import SourceMeans
from ovr_megatron.runtime.device import send


class PolicyObjective:
    """The loss that ``algorithm.loss`` names, with divergence from a reference and entropy bonus where they are set.

    It reads ``advantages`` and ``rollout_logprobs`` of a pack, and where the pack has them ``old_logprobs`` (else the
    step is strictly on-policy: the old log-probabilities are the current ones, detached), ``reference_logprobs``,
    ``teacher_logprobs``, ``weights``, ``positive_nll_weights``, ``modalities``, ``staleness`` and ``sources``.  The
    loss of a token is multiplied by the weight that ``algorithm.correction`` gives it.

    Args:
        config: the settings.
        cp: the context-parallel ranks of the policy, each of which has a part of every response; None: this rank has
            all of them.
        by_staleness: whether the packs of all ranks have ``staleness``.
        sources: names of the sources, whose index is in ``sources`` of a pack; none: the packs have no such array.

    Attributes:
        mismatch: differences between old log-probabilities and the rollout engine's.
        source_means: entropy, divergences and the loss's statistics of the tokens of each source.

    Raises:
        RegistryError: there is no such loss or correction.
        ConfigError: the correction cannot have these bounds.
    """

    def __init__(
        self,
        config: AlgorithmConfig,
        cp: dist.ProcessGroup | None = None,
        by_staleness: bool = False,
        sources: Sequence[str] = (),
    ):
        self.config = config
        self.mismatch = Mismatch(by_staleness)
        self.source_means = SourceMeans(sources)
        self.loss = find_loss(config.loss)
        self.correction = find_correction(config.correction) if config.correction else None
        self.bounds = correction_bounds(config) if config.correction else (0.0, math.inf)
        self.sum_over_ranks = partial(_sum_over, group=cp)

    def __call__(self, scores: Scores, pack: Pack) -> LossSum:
        """Return the loss of one pack; the loss's own statistics are summed as ``policy/NAME``."""
        config = self.config
        logprobs = scores.logprobs
        entropy = scores.entropy
        assert logprobs is not None and entropy is not None
        rollout = scores.beside(pack, "rollout_logprobs")
        if "old_logprobs" in pack.extras:
            old = scores.beside(pack, "old_logprobs")
        else:
            # Detached: the ratio is then exactly 1, and its gradient that of the current log-probabilities.
            old = logprobs.detach()
        advantages = scores.beside(pack, "advantages")
        teacher_kl = None
        if "teacher_logprobs" in pack.extras:
            # Of the token alone: what it does to later tokens is left out, as by a discount of 0.
            teacher_kl = kl_estimate(old, scores.beside(pack, "teacher_logprobs"), "k1")
            advantages = advantages - config.teacher_coefficient * teacher_kl
        response_ids = send(pack.document_of(scores.rows), logprobs.device)
        response_count = len(pack.cu_seqlens) - 1
        segments = ResponseSegments(response_ids, response_count, self.sum_over_ranks)
        losses, statistics = self.loss(logprobs, old, advantages, segments, config)
        # Of each token, detached, as these are only logged: a gradient would keep the graph of every pack.
        values = {"entropy": entropy.detach()}
        for name, value in statistics.items():
            values[f"policy/{name}"] = value.detach()
        values["rollout_kl"] = kl_estimate(rollout, old, "k3")
        if teacher_kl is not None:
            values["teacher_kl"] = teacher_kl
        correction_sums: dict[str, Tensor] = {}
        staleness = scores.beside(pack, "staleness") if "staleness" in pack.extras else None
        if self.correction is not None:
            importance, correction_sums = self._importance(self.correction, old - rollout, segments, staleness)
            losses = losses * importance
        if "reference_logprobs" in pack.extras:
            reference = scores.beside(pack, "reference_logprobs")
            divergence = kl_estimate(logprobs, reference, config.kl_form)
            values["reference_kl"] = divergence.detach()
            if config.kl_in == "loss":
                losses = losses + config.kl_coefficient * divergence
        if config.entropy_bonus:
            losses = losses - config.entropy_bonus * entropy
        if "modalities" in pack.extras:
            difference = (old - rollout).abs()
            self.mismatch.add(difference, scores.beside(pack, "modalities"), staleness)
        if "sources" in pack.extras:
            # A loss may give the sum of a statistic alone, which no source has a part of.
            token_values = {name: value for name, value in values.items() if value.dim()}
            self.source_means.add(token_values, scores.beside(pack, "sources"))
        sums = {name: value.sum() for name, value in values.items()} | correction_sums
        result = sum_weighted(losses, scores, pack, sums)
        if "positive_nll_weights" in pack.extras:
            # Beside the weighted losses: it is a mean over the tokens of right responses whatever the reduction.
            nll = -(scores.beside(pack, "positive_nll_weights") * logprobs).sum()
            sums["policy/positive_nll"] = nll.detach()
            result = replace(result, total=result.total + config.positive_nll * nll)
        return result

    def _importance(
        self,
        correction: Correction,
        log_ratio: Tensor,
        segments: ResponseSegments,
        staleness: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weight of each token [n] in the correction, and sums to log.

        The correction's own statistics are summed as ``rollout/NAME``.
        """
        batch = CorrectionInput(log_ratio, segments, staleness, *self.bounds)
        importance, statistics = correction.weigh(batch)
        # In float64: the square of a weight without a bound may be too large for float32.
        square = importance.double().square()
        sums = {"importance": importance.sum(), "importance_square": square.sum()}
        for name, value in statistics.items():
            sums[f"rollout/{name}"] = value
        return importance, sums


def _sum_over(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum ``values`` over the ranks of ``group``, in place.  A collective of theirs."""
    if group is not None and group.size() > 1:
        dist.all_reduce(values, group=group)
    return values


class ValueObjective:
    """Squared error to the returns; with ``value_clip``, Open-Reasoner-Zero's clipped form."""

    def __init__(self, config: AlgorithmConfig):
        self.config = config

    def __call__(self, scores: Scores, pack: Pack) -> LossSum:
        """Return the loss of one pack."""
        values = scores.values
        assert values is not None
        returns = scores.beside(pack, "returns")
        old_values = scores.beside(pack, "values")
        losses = value_loss(values, returns, old_values, self.config.value_clip)
        return sum_weighted(losses, scores, pack, {})


def sum_weighted(losses: Tensor, scores: Scores, pack: Pack, sums: dict[str, Tensor]) -> LossSum:
    """Sum the losses of the tokens, times their ``weights`` where the pack has some (`reductions.token_weights`)."""
    if "weights" in pack.extras:
        weights = scores.beside(pack, "weights")
    else:
        weights = torch.ones_like(losses)
    total = (losses * weights).sum()
    return LossSum(total, len(scores.rows), sums)
