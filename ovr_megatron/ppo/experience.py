"""From graded responses to what the models learn from: log-probabilities, values, advantages, returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ovr_megatron.config import AlgorithmConfig, RLConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.engine import Engine
from ovr_megatron.ppo.advantages import (
    Ragged,
    discounted_sums,
    generalised_advantages,
    group_advantages,
    leave_one_out_advantages,
    mean_and_std,
    moments,
    normalise,
    overlong_penalty,
    scaled_reward,
    token_rewards,
)
from ovr_megatron.ppo.batch import Batch, Response
from ovr_megatron.ppo.losses import kl_estimate
from ovr_megatron.ppo.rollouts import Rollout, exchange_responses
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.exchange import exchange
from ovr_megatron.runtime.layout import Layout

Key = tuple[int, int]


@dataclass
class Models:
    """What an iteration trains and asks; critic and reference only where the algorithm needs them."""

    config: RLConfig
    world: World
    processor: Processor
    policy: Engine
    critic: Engine | None
    reference: Engine | None

    def only(self, working: Engine | None) -> None:
        """With ``offload``, have all but ``working`` wait in host memory; it takes what it needs as it needs it."""
        for engine in (self.policy, self.critic, self.reference) if self.config.offload else ():
            if engine is not None and engine is not working:
                engine.offload()


@dataclass
class Experience:
    """What the policy learns from in an iteration: this rank's responses, and per-token arrays [n] for each.

    ``advantages`` are those that the loss takes, normalised where the estimator is; ``values`` are missing without a
    critic, ``old`` (log-probabilities before the update) where the policy takes one step, ``reference`` without one.
    """

    responses: list[Response]
    batch: Batch
    advantages: Ragged
    values: Ragged | None = None
    old: Ragged | None = None
    reference: Ragged | None = None


@dataclass
class Study:
    """What the critic learns from: its own share of the responses, with values [n] and returns [n] for each."""

    batch: Batch
    values: Ragged
    returns: Ragged


def evaluate(
    models: Models, rollout: Rollout, responses: list[Response], batch: Batch
) -> tuple[Experience, Study | None]:
    """Log-probabilities where they are needed, values, and advantages; no model changes."""
    algorithm, world = models.config.algorithm, models.world
    experience = Experience(responses, batch, [])
    layout = batch.group_into_packs(range(len(batch)))
    penalties = None
    in_reward = models.reference is not None and algorithm.kl_in == "reward"
    if algorithm.policy_updates > 1 or in_reward:
        models.only(models.policy)
        experience.old = _logprobs(models.policy, batch, layout)
    if models.reference is not None:
        models.only(models.reference)
        experience.reference = _logprobs(models.reference, batch, layout)
        if in_reward:
            assert experience.old is not None
            penalties = [
                algorithm.kl_coefficient * kl_estimate(torch.tensor(a), torch.tensor(b), algorithm.kl_form).numpy()
                for a, b in zip(experience.old, experience.reference, strict=True)
            ]
    scores = [shaped_reward(r, rollout, algorithm) for r in responses]
    rewards = token_rewards(scores, batch.lengths, penalties)
    groups = [r.prompt for r in responses]
    study = None
    if algorithm.estimator == "gae":
        study, experience.values, raw = _with_critic(models, rollout, experience, rewards)
    else:
        raw = advantages_without_values(algorithm, rewards, groups)
    if algorithm.estimator in ("gae", "reinforce_pp"):
        raw = normalise(raw, *mean_and_std(summed(moments(raw), world.layout)))
    experience.advantages = raw
    return experience, study


def _with_critic(
    models: Models, rollout: Rollout, experience: Experience, rewards: Ragged
) -> tuple[Study, Ragged, Ragged]:
    """The critic's own share with values and returns, and values and advantages of the policy's share.

    Where the critic has another layout its share is another one, and what is known of a response goes across.
    """
    critic, algorithm = models.critic, models.config.algorithm
    assert critic is not None
    models.only(critic)
    responses, batch = experience.responses, experience.batch
    shared = critic.layout is models.policy.layout
    if not shared:
        known = dict(zip(map(_key, responses), rewards, strict=True))
        responses, batch = own_share(models, rollout, critic)
        known = _across(known, models.policy, responses, critic)
        rewards = [known[_key(r)] for r in responses]
    layout = batch.group_into_packs(range(len(batch)))
    values = batch.unpack([scores.values for scores in critic.scores(batch.packs(layout))], layout)
    advantages, returns = generalised_advantages(rewards, values, algorithm.gamma, algorithm.lam)
    study = Study(batch, values, returns)
    if shared:
        return study, values, advantages
    pairs = zip(map(_key, responses), zip(values, advantages, strict=True), strict=True)
    known = _across(dict(pairs), critic, experience.responses, models.policy)
    found = [known[_key(r)] for r in experience.responses]
    return study, [v for v, _ in found], [a for _, a in found]


def advantages_without_values(algorithm: AlgorithmConfig, rewards: Ragged, groups: Sequence[int]) -> Ragged:
    """Return the advantages of an estimator that has no critic, before they are normalised over the batch.

    Args:
        algorithm: names the estimator.
        rewards: float [n] per response, of each token.
        groups: number of the prompt of each response.
    """
    if algorithm.estimator == "rloo":
        return leave_one_out_advantages(rewards, groups)
    if algorithm.estimator == "reinforce_pp":
        return discounted_sums(rewards, algorithm.gamma)
    return group_advantages(rewards, groups, divide=algorithm.estimator == "grpo")


def shaped_reward(response: Response, rollout: Rollout, algorithm: AlgorithmConfig) -> float:
    """Return what the estimator takes for a response: its scaled verdict less the overlong penalty."""
    limit = rollout.limit - len(rollout.prompts.sample(response.prompt))
    reward = scaled_reward(response.reward, algorithm.wrong_reward)
    return reward + overlong_penalty(len(response.tokens), limit, algorithm.overlong_buffer)


def own_share(models: Models, rollout: Rollout, engine: Engine) -> tuple[list[Response], Batch]:
    """The responses that ``engine`` trains on on this rank, and their batch."""
    responses = exchange_responses(rollout, engine.groups.dp.rank(), engine.groups.dp.size())
    samples = [models.processor.response_sample(rollout.prompts.sample(r.prompt), r.tokens) for r in responses]
    order, group = {prompt: i for i, prompt in enumerate(sorted(rollout.train_prompts))}, models.config.responses
    numbers = [order[r.prompt] * group + r.sample for r in responses]
    lengths = [len(r.tokens) for r in responses]
    return responses, Batch(samples, lengths, models.config.data.pack_tokens, numbers, len(order) * group)


def _across(known: dict[Key, Any], source: Engine, wanted: Sequence[Response], target: Engine) -> dict[Key, Any]:
    """What ranks of ``source`` know of responses, on the ranks of ``target`` that ask for those ``wanted``."""
    asked: list[list[Key]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(asked, [_key(r) for r in wanted])
    leads = source.layout.leads_replica
    told = {peer: {key: known[key] for key in keys if leads and key in known} for peer, keys in enumerate(asked)}
    return {key: value for part in exchange(told) for key, value in part.items()}


def _key(response: Response) -> Key:
    return response.prompt, response.sample


def _logprobs(engine: Engine, batch: Batch, layout: list[list[int]]) -> Ragged:
    return batch.unpack([scores.logprobs for scores in engine.scores(batch.packs(layout))], layout)


def summed(values: np.ndarray, layout: Layout) -> np.ndarray:
    """Sum of ``values`` over the data-parallel ranks of ``layout``."""
    total = torch.from_numpy(np.asarray(values, np.float64))
    if torch.cuda.is_available():
        total = total.cuda()
    dist.all_reduce(total, group=layout.groups.dp)
    return total.cpu().numpy()
