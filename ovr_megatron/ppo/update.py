"""Take the optimizer steps of an iteration."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from ovr_megatron.data.packing import Pack
from ovr_megatron.ppo.advantages import Ragged, explained_variance, mean_and_std, moments
from ovr_megatron.ppo.experience import CriticBatch, Experience, Models, sum_over_dp
from ovr_megatron.ppo.mismatch import token_modalities
from ovr_megatron.ppo.objectives import PolicyObjective, ValueObjective
from ovr_megatron.ppo.reductions import ReductionCounts, positive_nll_weights, token_weights, unscaled_weights
from ovr_megatron.ppo.sources import SourceMeans
from ovr_megatron.ppo.staleness import has_older_tokens, token_staleness

# Names in the log of what `PolicyObjective` sums; what begins with its group has its name already.
LOGGED_NAMES = {
    "entropy": "policy/entropy",
    "rollout_kl": "rollout/kl",
    "importance": "rollout/importance",
    "sample_size": "rollout/effective_sample_size",
    "reference_kl": "policy/reference_kl",
    "teacher_kl": "policy/teacher_kl",
}


def update_critic(models: Models, critic_batch: CriticBatch) -> dict[str, float]:
    """Take ``critic_steps`` steps, each on its minibatch and divided by its own tokens over all ranks.  A collective.

    There are fewer steps where an iteration has fewer responses than that.
    """
    config = models.config.algorithm
    critic = models.critic
    assert critic is not None
    objective = ValueObjective(config)
    step_metrics = []
    # The number of steps goes by the responses of all ranks: each must take part in every step.
    step_count = min(config.critic_steps, critic_batch.batch.total)
    for step in range(step_count):
        packs = critic_packs(models, critic_batch, step)
        step_metrics.append(critic.train(packs, objective))
    metrics = mean_over_steps(step_metrics)
    return {
        "critic/loss": metrics["loss"],
        "critic/grad_norm": metrics["grad_norm"],
    }


def value_metrics(models: Models, critic_batch: CriticBatch) -> dict[str, float]:
    """Return what the values before the critic's update are: mean, spread, and share of the returns' variance.

    A collective.
    """
    critic = models.critic
    assert critic is not None
    errors = []
    for returns, values in zip(critic_batch.returns, critic_batch.values, strict=True):
        errors.append(returns - values)
    # Moments and not deviations, as these would not add up over ranks of unequal numbers of tokens.
    value_moments = sum_over_dp(moments(critic_batch.values), critic.layout)
    error_moments = sum_over_dp(moments(errors), critic.layout)
    return_moments = sum_over_dp(moments(critic_batch.returns), critic.layout)
    value_mean, value_std = mean_and_std(value_moments)
    return_mean, _ = mean_and_std(return_moments)
    metrics = {
        "critic/value_mean": value_mean,
        "critic/value_std": value_std,
        "critic/return_mean": return_mean,
        "critic/explained_variance": explained_variance(error_moments, return_moments),
    }
    sources = critic_batch.sources
    for i, name in enumerate(sources.names):
        source_errors = sum_over_dp(moments(sources.of(errors, i)), critic.layout)
        source_returns = sum_over_dp(moments(sources.of(critic_batch.returns, i)), critic.layout)
        if source_returns[0]:  # tokens
            metrics[f"critic/explained_variance/source/{name}"] = explained_variance(source_errors, source_returns)
    return metrics


def critic_packs(models: Models, critic_batch: CriticBatch, step: int) -> list[Pack]:
    """Build the packs of the critic's step ``step``, with targets and token weights.  A collective."""
    config = models.config.algorithm
    critic = models.critic
    assert critic is not None
    batch = critic_batch.batch
    members = batch.minibatch(step, config.critic_steps)
    pack_members = batch.group_into_packs(members)
    sum_over_ranks = partial(sum_over_dp, layout=critic.layout)
    divisor = models.config.reduction_tokens
    weights = token_weights(config.reduction, batch.lengths, pack_members, divisor, sum_over_ranks)
    return batch.packs(
        pack_members,
        returns=critic_batch.returns,
        values=critic_batch.values,
        weights=weights,
    )


def update_policy(models: Models, experience: Experience, iteration: int) -> dict[str, float]:
    """Go ``policy_epochs`` times over the batch in ``policy_steps`` steps each.  A collective.

    It is strictly on-policy if that is one step, and the weights before it drew all tokens.
    """
    config = models.config.algorithm
    by_staleness = has_older_tokens(experience.responses, models.config.rollout.max_staleness)
    token_arrays = _token_arrays(experience)
    if by_staleness:
        token_arrays["staleness"] = token_staleness(experience.responses, iteration)
    sources = experience.sources
    objective = PolicyObjective(config, models.policy.groups.cp, by_staleness, sources.names)
    # As many on every rank, also on one that has no responses in a step.
    step_count = min(config.policy_steps, experience.batch.total)
    step_metrics = []
    for _ in range(config.policy_epochs):
        for step in range(step_count):
            packs = policy_packs(models, experience, token_arrays, step)
            step_metrics.append(models.policy.train(packs, objective))
            if objective.correction is not None:
                step_metrics[-1]["sample_size"] = effective_sample_size(step_metrics[-1])
    return _objective_metrics(objective, step_metrics)


def _token_arrays(experience: Experience) -> dict[str, Ragged]:
    """Return the arrays [n] of each response that metrics are told apart by, the same names on all ranks."""
    batch = experience.batch
    arrays: dict[str, Ragged] = {"modalities": token_modalities(batch.samples, batch.lengths)}
    if experience.sources.names:
        arrays["sources"] = experience.sources.token_indices(batch.lengths)
    return arrays


def _objective_metrics(objective: PolicyObjective, step_metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the metrics of the policy's steps and those that its objective has collected.  A collective."""
    mismatch = objective.mismatch.metrics()  # after the last step, as it waits for the device
    metrics = policy_metrics(mean_over_steps(step_metrics), mismatch)
    if objective.source_means.names:
        metrics |= source_metrics(objective.source_means)
    return metrics


class PolicyStep:
    """The policy's only step of an iteration, whose responses come in parts.  `add` and `finish` are collectives.

    Its gradients equal those of `update_policy` up to rounding, except with ``reduction=pack``: packs are formed within
    a part.  `finish` scales the gradients where the reduction divides by the responses or packs of all parts.

    Args:
        models: those of the run.
        sources: names of all sources of the iteration, if there are several.
    """

    def __init__(self, models: Models, sources: Sequence[str]) -> None:
        config = models.config.algorithm
        self._models = models
        self._objective = PolicyObjective(config, models.policy.groups.cp, sources=sources)
        self._counts = ReductionCounts()
        self._means: dict[str, float] = {}
        models.policy.clear_gradients()

    def add(self, experience: Experience, is_last: bool) -> None:
        """Compute the gradients of a part; those of all ranks are reduced with the last part."""
        config = self._models.config
        policy = self._models.policy
        batch = experience.batch
        pack_members = batch.group_into_packs(range(len(batch)))
        self._counts.add(batch.lengths, pack_members)
        reduction = config.algorithm.reduction
        weights = unscaled_weights(reduction, batch.lengths, pack_members, config.reduction_tokens)
        packs = _experience_packs(experience, pack_members, _token_arrays(experience), weights)
        if is_last:
            self._means = policy.reduce_gradients(packs, self._objective)
        else:
            policy.add_gradients(packs, self._objective)

    def finish(self) -> dict[str, float]:
        """Take the optimizer step, and return its metrics."""
        policy = self._models.policy
        sum_over_ranks = partial(sum_over_dp, layout=policy.layout)
        scale = self._counts.scale(self._models.config.algorithm.reduction, sum_over_ranks)
        if scale != 1:
            policy.scale_gradients(scale)
        metrics = self._means | {"loss": self._means["loss"] * scale} | policy.step()
        if self._objective.correction is not None:
            metrics["sample_size"] = effective_sample_size(metrics)
        return _objective_metrics(self._objective, [metrics])


def source_metrics(source_means: SourceMeans) -> dict[str, float]:
    """Return the metrics of each source, under the names of the log.  A collective."""
    metrics = {}
    for source, means in source_means.means().items():
        for name, mean in means.items():
            metrics[f"{LOGGED_NAMES.get(name, name)}/source/{source}"] = mean
    return metrics


def effective_sample_size(means: dict[str, float]) -> float:
    """Return (sum of w)^2 / (N times the sum of w^2), w the weight of each of N tokens of a step (Kong 1992).

    It is the share of tokens that, weighed alike, would give as small a variance: 1 where all weights are the same, and
    0 where all are 0.

    Args:
        means: over the tokens of the step, of w as ``importance`` and of w^2 as ``importance_square``.
    """
    square = means["importance_square"]
    return means["importance"] ** 2 / square if square else 0.0


def policy_metrics(means: dict[str, float], mismatch: dict[str, float]) -> dict[str, float]:
    """Return the metrics of an iteration, under the names of the log.

    Args:
        means: over the iteration's steps.
        mismatch: those of `Mismatch.metrics`.
    """
    metrics = {"policy/loss": means["loss"]}
    for key, value in means.items():
        if key.startswith(("policy/", "rollout/")):  # statistics of the loss and of the correction
            metrics[key] = value
    metrics["policy/grad_norm"] = means["grad_norm"]
    metrics |= mismatch
    for key, name in LOGGED_NAMES.items():
        if key in means:
            metrics[name] = means[key]
    return metrics


def policy_packs(models: Models, experience: Experience, token_arrays: Mapping[str, Ragged], step: int) -> list[Pack]:
    """Build the packs of the policy's step ``step``, with what its objective reads.  A collective.

    ``token_arrays`` has further arrays [n] of each response by name, the same names on all ranks: ``modalities``
    (`token_modalities`), where responses have versions ``staleness`` (`token_staleness`), and where there are several
    sources ``sources`` (`ResponseSources.token_indices`).
    """
    config = models.config.algorithm
    batch = experience.batch
    members = batch.minibatch(step, config.policy_steps)
    pack_members = batch.group_into_packs(members)
    sum_over_ranks = partial(sum_over_dp, layout=models.policy.layout)
    divisor = models.config.reduction_tokens
    weights = token_weights(config.reduction, batch.lengths, pack_members, divisor, sum_over_ranks)
    likelihood = None
    if config.positive_nll:
        right = [r.reward >= 1 for r in experience.responses]
        likelihood = positive_nll_weights(right, batch.lengths, members, sum_over_ranks)
    old_logprobs = None
    # One step is strictly on-policy, also where a divergence in the reward has had them computed.
    if config.policy_updates > 1:
        old_logprobs = experience.old
    return _experience_packs(
        experience,
        pack_members,
        token_arrays,
        weights,
        old_logprobs=old_logprobs,
        positive_nll_weights=likelihood,
    )


def _experience_packs(
    experience: Experience,
    pack_members: Sequence[Sequence[int]],
    token_arrays: Mapping[str, Ragged],
    weights: Ragged | None,
    **arrays: Ragged | None,
) -> list[Pack]:
    """Build packs with what every step of the policy reads, and further ``arrays`` of a step."""
    return experience.batch.packs(
        pack_members,
        advantages=experience.advantages,
        rollout_logprobs=[r.logprobs for r in experience.responses],
        **token_arrays,
        reference_logprobs=experience.reference,
        teacher_logprobs=experience.teacher,
        weights=weights,
        **arrays,
    )


def mean_over_steps(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Average each metric over the steps that have it."""
    values: dict[str, list[float]] = defaultdict(list)
    for metrics in steps:
        for name, value in metrics.items():
            values[name].append(value)
    means = {}
    for name, step_values in values.items():
        means[name] = float(np.mean(step_values))
    return means
