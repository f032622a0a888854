"""The optimizer steps of an iteration."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from ovr_megatron.data.packing import Pack
from ovr_megatron.ppo.advantages import explained_variance, mean_and_std, moments
from ovr_megatron.ppo.experience import CriticBatch, Experience, Models, sum_over_dp
from ovr_megatron.ppo.losses import token_weights
from ovr_megatron.ppo.mismatch import token_modalities
from ovr_megatron.ppo.objectives import PolicyObjective, ValueObjective


def update_critic(models: Models, critic_batch: CriticBatch) -> dict[str, float]:
    """Take ``critic_steps`` steps, each on its part of the responses and divided by its own tokens over all ranks.

    There are fewer steps where an iteration has fewer responses than that.
    """
    config, critic = models.config.algorithm, models.critic
    assert critic is not None
    total = partial(sum_over_dp, layout=critic.layout)
    objective = ValueObjective(config)
    turns = range(min(config.critic_steps, critic_batch.batch.total))
    found = mean_of([critic.train(critic_packs(models, critic_batch, turn), objective) for turn in turns])
    spread = mean_and_std(total(moments(critic_batch.values)))[1]
    errors = [a - b for a, b in zip(critic_batch.returns, critic_batch.values, strict=True)]
    explained = explained_variance(total(moments(errors)), total(moments(critic_batch.returns)))
    return {
        "critic/loss": found["loss"],
        "critic/grad_norm": found["grad_norm"],
        "critic/value_std": spread,
        "critic/explained_variance": explained,
    }


def critic_packs(models: Models, critic_batch: CriticBatch, turn: int) -> list[Pack]:
    """Packs of the critic's step ``turn``, its targets and the weights of its tokens inside."""
    config, critic = models.config.algorithm, models.critic
    assert critic is not None
    layout = critic_batch.batch.group_into_packs(critic_batch.batch.minibatch(turn, config.critic_steps))
    total = partial(sum_over_dp, layout=critic.layout)
    divisor = models.config.reduction_tokens
    weights = token_weights(config.reduction, critic_batch.batch.lengths, layout, divisor, total)
    return critic_batch.batch.packs(layout, returns=critic_batch.returns, values=critic_batch.values, weights=weights)


def update_policy(models: Models, experience: Experience) -> dict[str, float]:
    """``policy_epochs`` times over the batch in ``policy_steps`` steps each; strictly on-policy if that is one step."""
    config, policy, batch = models.config.algorithm, models.policy, experience.batch
    objective = PolicyObjective(config)
    rollout_logprobs = [r.logprobs for r in experience.responses]
    modalities = token_modalities(batch.samples, batch.lengths)
    steps = []
    turns = range(min(config.policy_steps, batch.total))
    for turn in (turn for _ in range(config.policy_epochs) for turn in turns):
        layout = batch.group_into_packs(batch.minibatch(turn, config.policy_steps))
        total = partial(sum_over_dp, layout=policy.layout)
        packs = batch.packs(
            layout,
            advantages=experience.advantages,
            rollout_logprobs=rollout_logprobs,
            modalities=modalities,
            old_logprobs=experience.old if config.policy_updates > 1 else None,
            reference_logprobs=experience.reference,
            weights=token_weights(config.reduction, batch.lengths, layout, models.config.reduction_tokens, total),
        )
        steps.append(policy.train(packs, objective))
    found = mean_of(steps)
    metrics = {f"policy/{key}": found[key] for key in ("loss", "entropy", "clip_fraction", "grad_norm")}
    metrics |= objective.mismatch.metrics() | {"rollout/kl": found["rollout_kl"]}
    optional = {"importance": "rollout/importance", "reference_kl": "policy/reference_kl"}
    return metrics | {name: found[key] for key, name in optional.items() if key in found}


def mean_of(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each number over the steps that have it."""
    names = {name for step in steps for name in step}
    return {name: float(np.mean([step[name] for step in steps if name in step])) for name in names}
