"""Bring graded responses to the ranks that train on them, and compute what the models learn from.

That is log-probabilities, values, advantages and returns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from ovr_megatron.config import AlgorithmConfig, RLConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.samples import Sample
from ovr_megatron.engine import MEMORY_KINDS, Engine
from ovr_megatron.ppo.advantages import (
    Ragged,
    cosine_reward,
    mean_and_std,
    moments,
    normalise,
    overlong_penalty,
    scaled_reward,
    token_rewards,
)
from ovr_megatron.ppo.batch import Batch, Response, balance_prompts
from ovr_megatron.ppo.estimators import Estimate, EstimatorInput, find_estimator
from ovr_megatron.ppo.losses import kl_estimate
from ovr_megatron.ppo.rollouts import Rollout
from ovr_megatron.ppo.sources import ResponseSources, response_sources
from ovr_megatron.ppo.warmup import CriticWarmup, WarmupState, policy_steps
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.exchange import exchange, gather_objects
from ovr_megatron.runtime.layout import Layout

ResponseKey = tuple[int, int]  # index of the prompt and of the response among those to it
Item = TypeVar("Item")


@dataclass
class Models:
    """The models of an iteration; critic, reference and teacher only where the algorithm needs them.

    A policy with adapters may be its own reference.

    Attributes:
        warmup: says in which iterations the policy learns; a resumed run loads its progress.
    """

    config: RLConfig
    world: World
    processor: Processor
    policy: Engine
    critic: Engine | None
    reference: Engine | None
    teacher: Engine | None = None
    warmup: CriticWarmup = field(init=False)

    def __post_init__(self) -> None:
        self.warmup = CriticWarmup.from_config(self.config)

    def load_warmup(self, state: WarmupState) -> None:
        """Go on from the warm-up's progress in a checkpoint."""
        self.warmup.load(state)
        self.follow_warmup()

    def follow_warmup(self) -> None:
        """Have the policy's learning rate begin where the warm-up ends, as far as that is known."""
        # While the end is open the policy takes no step, so that none was taken by another schedule.
        if not self.warmup.critic_only:
            self.policy.total_steps = policy_steps(self.config, self.warmup)

    def offload_except(self, active: Engine | None) -> None:
        """With ``offload``, offload all models but ``active``, which onloads what it needs when it needs it."""
        if not self.config.offload:
            return
        for engine in (self.policy, self.critic, self.reference, self.teacher):
            if engine is None or engine is active:
                continue
            kinds = MEMORY_KINDS
            if active is not None and active.shares_base(engine):
                kinds = tuple(kind for kind in MEMORY_KINDS if kind != "base")
            engine.offload(*kinds)


@dataclass
class Experience:
    """This rank's responses of an iteration, and the arrays [n] for each that the policy learns from.

    Attributes:
        responses: in order of their prompts.
        batch: their samples.
        advantages: of the estimator, normalised where the estimator is.
        values: of the critic; None without one.
        old: log-probabilities before the update; None where the policy takes at most one step and no reward needs
            them.
        reference: log-probabilities of the reference; None without one, and where nothing reads them.
        teacher: log-probabilities of the teacher, from which the loss takes its part of the advantages; likewise.
        sources: of the responses.
    """

    responses: list[Response]
    batch: Batch
    advantages: Ragged
    values: Ragged | None = None
    old: Ragged | None = None
    reference: Ragged | None = None
    teacher: Ragged | None = None
    sources: ResponseSources = field(default_factory=ResponseSources)


@dataclass
class CriticBatch:
    """The critic's share of the responses, in its own layout, with values [n], returns [n] and the source of each."""

    batch: Batch
    values: Ragged
    returns: Ragged
    sources: ResponseSources = field(default_factory=ResponseSources)


def compute_experience(
    models: Models,
    rollout: Rollout,
    responses: list[Response],
    batch: Batch,
    iteration: int,
) -> tuple[Experience, CriticBatch | None]:
    """Compute log-probabilities where they are needed, values, and advantages; no model changes.  A collective.

    Args:
        models: the policy and what the algorithm needs beside it.
        rollout: of the iteration.
        responses: those that the policy trains on on this rank.
        batch: their samples.
        iteration: from 0; where the policy cannot learn in it, nothing is computed that its loss alone reads.

    Returns:
        What the policy learns from, and what the critic does; None without a critic.
    """
    algorithm = models.config.algorithm
    sources = response_sources(rollout.prompts.rows, responses)
    experience = Experience(responses, batch, [], sources=sources)
    pack_members = batch.group_into_packs(range(len(batch)))
    kl_in_reward = models.reference is not None and algorithm.kl_in == "reward"
    may_learn = models.warmup.may_train_policy(iteration)
    # One step is strictly on-policy: the loss takes the current log-probabilities for the old ones.
    if kl_in_reward or (may_learn and algorithm.policy_updates > 1):
        models.offload_except(models.policy)
        experience.old = _compute_logprobs(models.policy, batch, pack_members)
    if models.reference is not None and (kl_in_reward or may_learn):
        models.offload_except(models.reference)
        # A policy with adapters is its own reference without them.
        with models.reference.without_adapters():
            experience.reference = _compute_logprobs(models.reference, batch, pack_members)
    if models.teacher is not None and may_learn:
        experience.teacher = _compute_teacher_logprobs(models, models.teacher, rollout, experience)
    penalties = None
    if kl_in_reward:
        penalties = _kl_penalties(experience, algorithm)
    scores = [shaped_reward(r, rollout, algorithm) for r in responses]
    rewards = token_rewards(scores, batch.lengths, penalties)
    critic_batch = None
    if algorithm.has_critic:
        critic_batch, experience.values, raw = _compute_with_critic(models, rollout, experience, rewards)
    else:
        prompts = [r.prompt for r in responses]
        raw = estimate(algorithm, rewards, prompts).advantages
    if find_estimator(algorithm.estimator).normalises:
        # Over the batch of all ranks, so that advantages do not depend on how it is divided among them.
        total = sum_over_dp(moments(raw), models.world.layout)
        mean, std = mean_and_std(total)
        raw = normalise(raw, mean, std)
    experience.advantages = raw
    return experience, critic_batch


def _compute_logprobs(engine: Engine, batch: Batch, pack_members: list[list[int]]) -> Ragged:
    scores = engine.scores(batch.packs(pack_members))
    logprobs = [pack_scores.logprobs for pack_scores in scores]
    return batch.unpack(logprobs, pack_members)


def _compute_teacher_logprobs(models: Models, teacher: Engine, rollout: Rollout, experience: Experience) -> Ragged:
    """Return the teacher's log-probabilities of the policy's responses, [n] per response.  A collective.

    A teacher of another layout scores another share of the responses, which is sent back to those that train on it.
    """
    models.offload_except(teacher)
    responses = experience.responses
    batch = experience.batch
    same_layout = teacher.layout is models.policy.layout
    if not same_layout:
        responses, batch = build_local_batch(models, rollout, teacher)
    pack_members = batch.group_into_packs(range(len(batch)))
    logprobs = _compute_logprobs(teacher, batch, pack_members)
    if same_layout:
        return logprobs
    return _redistribute(_by_key(responses, logprobs), teacher, experience.responses)


def _kl_penalties(experience: Experience, algorithm: AlgorithmConfig) -> Ragged:
    """Return what each token's reward loses for its divergence from the reference, [n] per response."""
    assert experience.old is not None and experience.reference is not None
    penalties = []
    for old, reference in zip(experience.old, experience.reference, strict=True):
        divergence = kl_estimate(torch.tensor(old), torch.tensor(reference), algorithm.kl_form)
        penalties.append(algorithm.kl_coefficient * divergence.numpy())
    return penalties


def _compute_with_critic(
    models: Models,
    rollout: Rollout,
    experience: Experience,
    rewards: Ragged,
) -> tuple[CriticBatch, Ragged, Ragged]:
    """Return the critic's batch, and values and advantages of the policy's share.  A collective.

    Where the critic has another layout its share is another one: rewards are sent from the ranks that hold them for the
    policy to those that need them for the critic, and values and advantages back.
    """
    critic = models.critic
    algorithm = models.config.algorithm
    assert critic is not None
    models.offload_except(critic)
    responses = experience.responses
    batch = experience.batch
    same_layout = critic.layout is models.policy.layout
    if not same_layout:
        responses, batch = build_local_batch(models, rollout, critic)
        policy_rewards = _by_key(experience.responses, rewards)
        rewards = _redistribute(policy_rewards, models.policy, responses)
    pack_members = batch.group_into_packs(range(len(batch)))
    scores = critic.scores(batch.packs(pack_members))
    pack_values = [pack_scores.values for pack_scores in scores]
    values = batch.unpack(pack_values, pack_members)
    prompts = [r.prompt for r in responses]
    advantages, returns = estimate(algorithm, rewards, prompts, values)
    assert returns is not None, "an estimator that needs values returns what the critic learns"
    critic_batch = CriticBatch(batch, values, returns, response_sources(rollout.prompts.rows, responses))
    if same_layout:
        return critic_batch, values, advantages
    # Values and advantages travel together, in one exchange instead of two.
    pairs = list(zip(values, advantages, strict=True))
    critic_pairs = _by_key(responses, pairs)
    policy_pairs = _redistribute(critic_pairs, critic, experience.responses)
    policy_values = []
    policy_advantages = []
    for value, advantage in policy_pairs:
        policy_values.append(value)
        policy_advantages.append(advantage)
    return critic_batch, policy_values, policy_advantages


def estimate(
    algorithm: AlgorithmConfig,
    rewards: Ragged,
    groups: Sequence[int],
    values: Ragged | None = None,
) -> Estimate:
    """Return the advantages before they are normalised over the batch, and with ``values`` the critic's targets.

    Args:
        algorithm: names the estimator.
        rewards: float [n] per response, of each token.
        groups: index of the prompt of each response.
        values: float [n] per response; None without a critic.
    """
    lam = algorithm.lam if algorithm.lam_policy is None else algorithm.lam_policy
    lam_critic = algorithm.lam if algorithm.lam_critic is None else algorithm.lam_critic
    batch = EstimatorInput(rewards, groups, values, algorithm.gamma, lam, lam_critic, algorithm.lam_alpha)
    return find_estimator(algorithm.estimator).compute(batch)


def shaped_reward(response: Response, rollout: Rollout, algorithm: AlgorithmConfig) -> float:
    """Return what the estimator takes for a response: its scaled verdict less the overlong penalty, or the cosine."""
    prompt_tokens = len(rollout.prompts.sample(response.prompt))
    limit = rollout.limit - prompt_tokens  # that of the rollout is of prompt and response together
    if algorithm.length_reward == "cosine":
        if not response.stopped:
            return algorithm.cosine_exceeded
        length = len(response.tokens)
        right = (algorithm.cosine_right, algorithm.cosine_right_limit)
        wrong = (algorithm.cosine_wrong, algorithm.cosine_wrong_limit)
        return cosine_reward(response.reward, length, limit, right, wrong)
    reward = scaled_reward(response.reward, algorithm.wrong_reward)
    penalty = overlong_penalty(len(response.tokens), limit, algorithm.overlong_buffer)
    return reward + penalty


def build_local_batch(models: Models, rollout: Rollout, engine: Engine) -> tuple[list[Response], Batch]:
    """Bring to this rank the responses that ``engine`` trains on here, and build their batch.  A collective."""
    dp = engine.groups.dp
    responses = exchange_responses(rollout, dp.rank(), dp.size())
    samples = []
    for r in responses:
        prompt_sample = rollout.prompts.sample(r.prompt)
        samples.append(models.processor.response_sample(prompt_sample, r.tokens))
    return responses, _build_batch(models.config, rollout, responses, samples)


def _build_batch(config: RLConfig, rollout: Rollout, responses: Sequence[Response], samples: Sequence[Sample]) -> Batch:
    """Build the batch of this rank's ``responses``, whose ``samples`` have prompt and response."""
    # Counted without the prompts that were left out, so that every step gets its share of responses.
    prompts = sorted(rollout.train_prompts)
    prompt_positions = {prompt: position for position, prompt in enumerate(prompts)}
    lengths = []
    global_indices = []
    for r in responses:
        lengths.append(len(r.tokens))
        first_index = prompt_positions[r.prompt] * config.responses
        global_indices.append(first_index + r.sample)
    total = len(prompts) * config.responses
    shared_prompts = [r.prompt for r in responses] if config.share_prompts else None
    return Batch(samples, lengths, config.data.pack_tokens, global_indices, total, shared_prompts)


def join_experiences(models: Models, rollout: Rollout, parts: Sequence[Experience]) -> Experience:
    """Return what this rank's policy has learned from in all ``parts`` of ``rollout``, by prompt."""
    keyed_responses = []
    for part_index, part in enumerate(parts):
        for position, response in enumerate(part.responses):
            keyed_responses.append((_key(response), part_index, position))
    keyed_responses.sort()
    order = [(part_index, position) for _, part_index, position in keyed_responses]
    responses = [parts[part_index].responses[position] for part_index, position in order]
    samples = [parts[part_index].batch.samples[position] for part_index, position in order]
    return Experience(
        responses,
        _build_batch(models.config, rollout, responses, samples),
        [parts[part_index].advantages[position] for part_index, position in order],
        old=_join([part.old for part in parts], order),
        reference=_join([part.reference for part in parts], order),
        teacher=_join([part.teacher for part in parts], order),
        sources=response_sources(rollout.prompts.rows, responses),
    )


def _join(parts: Sequence[Ragged | None], order: Sequence[tuple[int, int]]) -> Ragged | None:
    """Return the arrays of all parts in ``order``, by part and position; None where the parts have none."""
    present = [part for part in parts if part is not None]
    if len(present) < len(parts):
        return None
    return [present[part_index][position] for part_index, position in order]


def exchange_responses(rollout: Rollout, dp_rank: int, dp_size: int) -> list[Response]:
    """Send responses to the ranks that train on them, and return this rank's, in order of their prompts.

    All responses to a prompt go to the same data-parallel rank, and every rank gets equally many tokens as nearly as
    this allows.  A collective of all ranks; ranks of the same ``dp_rank`` get the same responses.

    Args:
        rollout: has the responses of this rank's engine; the prompts of those that arrive are encoded.
        dp_rank: of this rank, in the layout of the model that trains.
        dp_size: data-parallel size of that layout.
    """
    # By prompt and not by response: group baselines compare the responses to a prompt on one rank.
    dp_rank_of_prompt = balance_prompts(rollout.train_prompts, dp_size)
    dp_ranks = gather_objects(dp_rank)
    responses_by_dp_rank: dict[int, list[Response]] = defaultdict(list)
    for r in rollout.responses:
        if r.prompt in dp_rank_of_prompt:
            responses_by_dp_rank[dp_rank_of_prompt[r.prompt]].append(r)
    # The ranks of a replica work on the same batch: each of them gets all of its responses.
    outgoing = {}
    for peer, peer_dp_rank in enumerate(dp_ranks):
        outgoing[peer] = responses_by_dp_rank[peer_dp_rank]
    incoming = exchange(outgoing)
    responses = list(chain.from_iterable(incoming))
    # They come by rank of the sender, which changes with the number of engines and with who was free first.
    responses.sort(key=lambda r: (r.prompt, r.sample))
    prompt_indices = {r.prompt for r in responses}
    rollout.prompts.encode(sorted(prompt_indices))
    return responses


def _by_key(responses: Sequence[Response], items: Sequence[Item]) -> dict[ResponseKey, Item]:
    by_key = {}
    for response, item in zip(responses, items, strict=True):
        by_key[_key(response)] = item
    return by_key


def _key(response: Response) -> ResponseKey:
    return response.prompt, response.sample


def _redistribute(items: dict[ResponseKey, Item], source: Engine, responses: Sequence[Response]) -> list[Item]:
    """Return the item of each of ``responses`` from the rank that has it.  A collective.

    Args:
        items: those of this rank, which are divided as ``source`` divides responses.
        source: its replicas hold the items; of each the leader sends them, as its ranks hold the same.
        responses: those whose items this rank needs.
    """
    local_keys = [_key(r) for r in responses]
    requests = gather_objects(local_keys)
    # Ranks that lead no replica send empty replies: every rank takes part in the exchange.
    local_items = items if source.layout.leads_replica else {}
    replies: dict[int, dict[ResponseKey, Item]] = {}
    for peer, keys in enumerate(requests):
        reply = {}
        for key in keys:
            if key in local_items:
                reply[key] = local_items[key]
        replies[peer] = reply
    incoming: dict[ResponseKey, Item] = {}
    for peer_items in exchange(replies):
        incoming |= peer_items
    return [incoming[key] for key in local_keys]


def sum_over_dp(values: np.ndarray, layout: Layout) -> np.ndarray:
    """Sum ``values`` over the data-parallel ranks of ``layout``, in float64.  A collective of theirs."""
    total = torch.from_numpy(np.asarray(values, np.float64))
    if torch.cuda.is_available():
        total = total.cuda()
    dist.all_reduce(total, group=layout.groups.dp)
    return total.cpu().numpy()
