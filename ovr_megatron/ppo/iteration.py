"""One iteration: generate, grade, value, advantage, update, sync (paper, section 3.2; Open-Reasoner-Zero)."""

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
class Outcome:
    """What an iteration leaves behind."""

    metrics: dict[str, float]
    rollout: Rollout
    experience: Experience


def iterate(models: Models, rollouts: Rollouts, draw: Callable[[int], list[Row]], iteration: int) -> Outcome:
    """Run iteration ``iteration`` (from 0); ``draw`` gives the next prompts, the same on every rank."""
    clock = Clock()
    with clock("generate"):
        models.offload_except(None)
        rollout = rollouts.collect(draw, iteration, max_tokens(models.config.curriculum, iteration))
        rollouts.engine.sleep(deep=models.policy.trains_everything)  # else the frozen part would have to come again
    outcome = learn(models, rollout, iteration, clock)
    with clock("sync"):
        models.offload_except(models.policy)
        if models.config.offload:
            models.policy.offload("gradients", "optimizer")
        traffic = rollouts.engine.update(models.policy.held())
    outcome.metrics |= traffic.metrics() | clock.metrics(outcome.experience.batch, models.world)
    return outcome


def learn(models: Models, rollout: Rollout, iteration: int, clock: Clock) -> Outcome:
    """An iteration from graded responses on, but for the engine's new weights."""
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
    return Outcome(metrics, rollout, experience)


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
        generated, trained = sum_over_dp(np.array([sum(batch.lengths), sum(map(len, batch.samples))]), world.layout)
        metrics = {f"timing/{phase}": seconds for phase, seconds in self.seconds.items()} | {
            "timing/iteration": time.perf_counter() - self.began,
            "perf/train_tokens_per_second": trained / (self.seconds["value"] + self.seconds["update"]),
        }
        if "generate" in self.seconds:
            metrics["perf/generate_tokens_per_second"] = generated / self.seconds["generate"]
        return metrics


def response_metrics(rollout: Rollout) -> dict[str, float]:
    """Reward, length and stopping over all ranks, and reward and length of each source.

    A response without a reward counts in no mean of rewards, and a prompt that was given up in no mean at all.
    ``grading/failed`` counts the responses on which no grader came to a verdict.
    """
    rows = rollout.prompts.rows
    sources = sorted({row.source for row in rows})
    sums = np.zeros((1 + len(sources), 6))
    for r in rollout.responses:
        rewarded, answered = float(r.rewarded), float(bool(r.tokens))
        entry = np.array([rewarded, rewarded * r.reward, answered, len(r.tokens), r.stopped, r.failed])
        sums[0] += entry
        sums[1 + sources.index(rows[r.prompt].source)] += entry
    total = torch.from_numpy(sums)
    dist.all_reduce(total)
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
