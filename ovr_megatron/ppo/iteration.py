"""Run one iteration: generate, grade, value, advantage, update, sync (paper, section 3.2; Open-Reasoner-Zero)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from ovr_megatron.data.schema import Row
from ovr_megatron.ppo.batch import Batch
from ovr_megatron.ppo.curriculum import max_tokens
from ovr_megatron.ppo.experience import Experience, Models, build_local_batch, compute_experience, sum_over_dp
from ovr_megatron.ppo.rollouts import Rollout, Rollouts
from ovr_megatron.ppo.update import update_critic, update_policy
from ovr_megatron.runtime.distributed import World


@dataclass
class IterationResult:
    """Metrics of an iteration, its rollout, and what this rank's policy learned from."""

    metrics: dict[str, float]
    rollout: Rollout
    experience: Experience


def iterate(models: Models, rollouts: Rollouts, draw: Callable[[int], list[Row]], iteration: int) -> IterationResult:
    """Run iteration ``iteration`` (from 0); ``draw`` gives the next prompts, the same on every rank.  A collective."""
    clock = Clock()
    with clock("generate"):
        models.offload_except(None)
        rollout = rollouts.collect(draw, iteration, max_tokens(models.config.curriculum, iteration))
        # Deep sleep drops the engine's weights, and the next update sends all of them: too many where some are frozen.
        rollouts.engine.sleep(deep=models.policy.trains_everything)
    result = learn(models, rollout, iteration, clock)
    with clock("sync"):
        models.offload_except(models.policy)
        if models.config.offload:
            # The engine's weights need the memory, and its update reads the policy's weights alone.
            models.policy.offload("gradients", "optimizer")
        traffic = rollouts.engine.update(models.policy.held())
    # The clock's metrics again: those of `learn` do not have the seconds of this phase yet.
    result.metrics |= traffic.metrics() | clock.metrics(result.experience.batch, models.world)
    return result


def learn(models: Models, rollout: Rollout, iteration: int, clock: Clock) -> IterationResult:
    """Learn from graded responses: the iteration without generation and without the engine's update.  A collective."""
    with clock("value"):
        responses, batch = build_local_batch(models, rollout, models.policy)
        experience, critic_batch = compute_experience(models, rollout, responses, batch)
    metrics: dict[str, float] = {}
    with clock("update"):
        if critic_batch is not None:
            models.offload_except(models.critic)
            metrics |= update_critic(models, critic_batch)
        if iteration >= models.config.algorithm.critic_warmup_iterations:
            models.offload_except(models.policy)
            metrics |= update_policy(models, experience)
    metrics = {
        "curriculum/max_tokens": rollout.limit,
        **response_metrics(rollout),
        **metrics,
        **clock.metrics(batch, models.world),
        **rollout.metrics,
    }
    return IterationResult(metrics, rollout, experience)


class Clock:
    """Seconds of each phase, including the wait for the slowest rank."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the block as ``phase``.  A collective."""
        began = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # kernels may still run when the block has returned
        dist.barrier()
        self.seconds[phase] = time.perf_counter() - began

    def metrics(self, batch: Batch, world: World) -> dict[str, float]:
        """Return ``timing/`` in seconds and ``perf/`` in tokens per second over all ranks.  A collective."""
        local_tokens = np.array([sum(batch.lengths), sum(map(len, batch.samples))])
        response_tokens, all_tokens = sum_over_dp(local_tokens, world.layout)
        metrics = {f"timing/{phase}": seconds for phase, seconds in self.seconds.items()}
        metrics["timing/iteration"] = time.perf_counter() - self.began
        train_seconds = self.seconds["value"] + self.seconds["update"]
        metrics["perf/train_tokens_per_second"] = all_tokens / train_seconds
        if "generate" in self.seconds:
            metrics["perf/generate_tokens_per_second"] = response_tokens / self.seconds["generate"]
        return metrics


def response_metrics(rollout: Rollout) -> dict[str, float]:
    """Return reward, length and stopping over all ranks, and reward and length of each source.  A collective.

    A response without a reward counts in no mean of rewards, and a prompt that was given up in no mean at all.
    ``grading/failed`` counts the responses on which no grader came to a verdict.
    """
    rows = rollout.prompts.rows
    sources = sorted({row.source for row in rows})
    sums = np.zeros((1 + len(sources), 6))  # a row for all responses, then one for each source
    for r in rollout.responses:
        rewarded = float(r.rewarded)
        answered = float(bool(r.tokens))
        entry = np.array([rewarded, rewarded * r.reward, answered, len(r.tokens), r.stopped, r.failed])
        sums[0] += entry
        sums[1 + sources.index(rows[r.prompt].source)] += entry
    total = torch.from_numpy(sums)
    dist.all_reduce(total)  # over all ranks: only the leaders of engines have responses
    metrics: dict[str, float] = {}
    for source, entry in zip([None, *sources], total.tolist(), strict=True):
        rewarded, reward, answered, length, stopped, failed = entry
        if source is None:
            metrics["reward/mean"] = reward / max(rewarded, 1)
            metrics["response/length"] = length / max(answered, 1)
            metrics["response/stopped"] = stopped / max(answered, 1)
            metrics["grading/failed"] = failed
        elif len(sources) > 1:
            metrics[f"grading/failed/source/{source}"] = failed
            if rewarded:
                metrics[f"reward/source/{source}"] = reward / rewarded
            if answered:
                metrics[f"response/length/source/{source}"] = length / answered
    return metrics
