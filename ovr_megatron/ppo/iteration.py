"""One PPO iteration: generate, grade, value, advantage, update, sync (paper, section 3.2; Open-Reasoner-Zero)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from ovr_megatron.config import RLConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.schema import Row
from ovr_megatron.engine import Engine
from ovr_megatron.ppo import maths
from ovr_megatron.ppo.batch import Batch, Response
from ovr_megatron.ppo.curriculum import max_tokens
from ovr_megatron.ppo.objectives import PolicyObjective, ValueObjective
from ovr_megatron.ppo.rollouts import Prompts, collect
from ovr_megatron.rewards.pool import GraderPool
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.runtime.distributed import World


@dataclass
class Learner:
    """Everything an iteration works with."""

    config: RLConfig
    world: World
    processor: Processor
    policy: Engine
    critic: Engine
    rollout: RolloutEngine
    grader: GraderPool


@dataclass
class Outcome:
    """What an iteration leaves behind: metrics, and this rank's responses with their mean advantage."""

    metrics: dict[str, float] = field(default_factory=dict)
    prompts: Prompts | None = None
    responses: list[Response] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)


def iterate(learner: Learner, rows: Sequence[Row], iteration: int) -> Outcome:
    """Run iteration ``iteration`` (from 0) on the prompts ``rows``, the same on every rank."""
    config, world = learner.config, learner.world
    limit = max_tokens(config.curriculum, iteration)
    clock = Clock()

    with clock("generate"):
        prompts = Prompts(rows, learner.processor)
        responses = collect(learner.rollout, learner.grader, prompts, config, iteration, limit, world)
        learner.rollout.sleep()
    samples = [learner.processor.response_sample(prompts.sample(r.prompt), r.tokens) for r in responses]
    batch = Batch(samples, [len(r.tokens) for r in responses], config.data.pack_tokens)
    everyone = range(len(batch))

    with clock("value"):
        packs, layout = batch.packs(everyone)
        values = batch.unpack([scores.values for scores in learner.critic.scores(packs)], layout)

    rewards = [r.reward for r in responses]
    raw, returns = maths.generalised_advantages(rewards, values, config.algorithm.gamma, config.algorithm.lam)
    mean, std = maths.mean_and_std(summed(maths.moments(raw), world))
    advantages = maths.normalise(raw, mean, std)

    with clock("update"):
        value_objective = ValueObjective(config.algorithm)
        for turn in range(config.algorithm.critic_steps):
            share = everyone[turn :: config.algorithm.critic_steps]
            packs, _ = batch.packs(share, returns=returns, values=values)
            critic = learner.critic.train(packs, value_objective)
        policy_objective = PolicyObjective(config.algorithm)
        policy: dict[str, float] = {}
        if iteration >= config.algorithm.critic_warmup_iterations:
            logprobs = [r.logprobs for r in responses]
            packs, _ = batch.packs(everyone, advantages=advantages, rollout_logprobs=logprobs)
            policy = learner.policy.train(packs, policy_objective)

    with clock("sync"):
        learner.rollout.update(learner.policy.weights())

    metrics = {
        "curriculum/max_tokens": limit,
        **response_metrics(responses, prompts, world),
        "critic/loss": critic["loss"],
        "critic/grad_norm": critic["grad_norm"],
        "critic/value_std": maths.mean_and_std(summed(maths.moments(values), world))[1],
        "critic/explained_variance": maths.explained_variance(
            summed(maths.moments([a - b for a, b in zip(returns, values, strict=True)]), world),
            summed(maths.moments(returns), world),
        ),
        **policy_metrics(policy, policy_objective.largest),
        **clock.metrics(batch, world),
    }
    return Outcome(metrics, prompts, responses, [float(a.mean()) for a in advantages])


class Clock:
    """Seconds of each phase, waiting for the slowest rank included."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the block as ``phase``."""
        began = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        dist.barrier()
        self.seconds[phase] = time.perf_counter() - began

    def metrics(self, batch: Batch, world: World) -> dict[str, float]:
        """``timing/`` in seconds and ``perf/`` in tokens per second over all ranks."""
        generated, trained = summed(np.array([sum(batch.lengths), sum(map(len, batch.samples))]), world)
        return {f"timing/{phase}": seconds for phase, seconds in self.seconds.items()} | {
            "timing/iteration": time.perf_counter() - self.began,
            "perf/generate_tokens_per_second": generated / self.seconds["generate"],
            "perf/train_tokens_per_second": trained / (self.seconds["value"] + self.seconds["update"]),
        }


def summed(values: np.ndarray, world: World) -> np.ndarray:
    """Sum of ``values`` over the data-parallel ranks."""
    total = torch.from_numpy(np.asarray(values, np.float64)).to(world.device)
    dist.all_reduce(total, group=world.groups.dp)
    return total.cpu().numpy()


def policy_metrics(policy: dict[str, float], largest: float) -> dict[str, float]:
    """The policy's part of the metrics; empty while only the critic trains."""
    if not policy:
        return {}
    peak = torch.tensor(largest)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return {
        "policy/loss": policy["loss"],
        "policy/entropy": policy["entropy"],
        "policy/clip_fraction": policy["clip_fraction"],
        "policy/grad_norm": policy["grad_norm"],
        "rollout/mismatch_mean": policy["mismatch_mean"],
        "rollout/mismatch_max": float(peak),
    }


def response_metrics(responses: Sequence[Response], prompts: Prompts, world: World) -> dict[str, float]:
    """Reward, length and stopping over all ranks, and the reward of each source."""
    sources = sorted({row.source for row in prompts.rows})
    sums = np.zeros((1 + len(sources), 4))
    for r in responses:
        entry = np.array([1.0, r.reward, len(r.tokens), r.stopped])
        sums[0] += entry
        sums[1 + sources.index(prompts.rows[r.prompt].source)] += entry
    total = summed(sums, world)
    everything = total[0, 1:] / total[0, 0]
    metrics = dict(zip(("reward/mean", "response/length", "response/stopped"), everything.tolist(), strict=True))
    for source, entry in zip(sources, total[1:], strict=True):
        if entry[0] and len(sources) > 1:
            metrics[f"reward/{source}"] = float(entry[1] / entry[0])
    return metrics
