"""Run one iteration: generate, grade, value, advantage, update, sync (paper, section 3.2; Open-Reasoner-Zero)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from ovr_megatron.ppo.batch import Batch, Response
from ovr_megatron.ppo.curriculum import max_tokens
from ovr_megatron.ppo.experience import Experience, Models, build_local_batch, compute_experience, sum_over_dp
from ovr_megatron.ppo.prompts import PromptStream
from ovr_megatron.ppo.rollouts import Rollout, Rollouts
from ovr_megatron.ppo.staleness import has_older_tokens, staleness_metrics, token_staleness
from ovr_megatron.ppo.timeline import Timeline
from ovr_megatron.ppo.update import update_critic, update_policy, value_metrics
from ovr_megatron.ppo.warmup import MIN_IMPROVEMENT
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.logs import get_logger

logger = get_logger(__name__)


@dataclass
class IterationResult:
    """Metrics of an iteration, its rollout, what this rank's policy learned from, and what the rank did when."""

    metrics: dict[str, float]
    rollout: Rollout
    experience: Experience
    timeline: Timeline


def iterate(models: Models, rollouts: Rollouts, prompts: PromptStream, iteration: int) -> IterationResult:
    """Run iteration ``iteration`` (from 0) on the next of ``prompts``, the same on every rank.  A collective."""
    clock = Clock()
    with clock("generate", "sleep"):
        models.offload_except(None)  # with `offload`, vLLM's cache takes their memory
        limit = max_tokens(models.config.curriculum, iteration)
        rollout = rollouts.collect(prompts, iteration, limit, clock.timeline)
        # Deep sleep drops the engine's weights, and the next update sends all of them: too many where some are frozen.
        rollouts.engine.sleep(deep=models.policy.updates_rewrite_vllm)
    result = learn(models, rollout, iteration, clock)
    with clock("sync"):
        models.offload_except(models.policy)
        if models.config.offload:
            # The engine's weights need the memory, and its update reads the policy's weights alone.
            models.policy.offload("gradients", "optimizer")
        traffic = rollouts.engine.update(models.policy.held())
    result.metrics |= traffic.metrics()
    # The clock's metrics again: those of `learn` do not have the seconds of this phase yet.
    result.metrics |= clock.metrics(result.experience.batch, models.world)
    return result


def learn(models: Models, rollout: Rollout, iteration: int, clock: Clock) -> IterationResult:
    """Learn from graded responses: the iteration without generation and without the engine's update.  A collective."""
    with clock("value"):
        responses, batch = build_local_batch(models, rollout, models.policy)
        experience, critic_batch = compute_experience(models, rollout, responses, batch, iteration)
    # Also in iterations in which the policy takes no step.
    metrics = rollout_staleness(models, responses, iteration)
    with clock("update"):
        if critic_batch is not None:
            metrics |= value_metrics(models, critic_batch)
            observe_values(models, metrics, iteration)
            models.offload_except(models.critic)
            metrics |= update_critic(models, critic_batch)
        if models.warmup.trains_policy(iteration):
            models.offload_except(models.policy)
            metrics |= update_policy(models, experience, iteration)
    metrics = {
        "curriculum/max_tokens": rollout.limit,
        **response_metrics(rollout),
        **metrics,
        **clock.metrics(batch, models.world),
        **rollout.metrics,
    }
    return IterationResult(metrics, rollout, experience, clock.timeline)


def rollout_staleness(models: Models, responses: Sequence[Response], iteration: int) -> dict[str, float]:
    """Return how much older than the policy the tokens of ``responses`` are; none where none can be.  A collective."""
    max_staleness = models.config.rollout.max_staleness
    if not has_older_tokens(responses, max_staleness):
        return {}
    return staleness_metrics(token_staleness(responses, iteration), ages=max_staleness + 1)


def observe_values(models: Models, metrics: dict[str, float], iteration: int) -> None:
    """Log the values before any training, and let those of ``iteration`` end the warm-up.  A collective.

    Args:
        models: those of the run.
        metrics: of `value_metrics`.
        iteration: from 0.
    """
    explained = metrics["critic/explained_variance"]
    if iteration == 0 and models.world.is_main:
        mean, spread, returns = (metrics[f"critic/{name}"] for name in ("value_mean", "value_std", "return_mean"))
        logger.info(
            f"values before training: mean {mean:.3g} (returns {returns:.3g}), standard deviation {spread:.3g}, "
            f"explained variance {explained:.3f}"
        )
    warmup = models.warmup
    if warmup.patience:
        # That of the first rank, so that all of them agree: sums of other groups of ranks may round otherwise.
        agreed = torch.tensor([explained], dtype=torch.float64)
        dist.broadcast(agreed, src=0)
        ends = warmup.observe(iteration, float(agreed))
        if ends and models.world.is_main:
            follows = "the run ends here" if warmup.critic_only else "the policy learns from here on"
            logger.info(
                f"iteration {iteration}: the explained variance has not risen by {MIN_IMPROVEMENT:g} in "
                f"{warmup.iterations_without_rise} iterations (best {warmup.best:.3f}); {follows}"
            )
        models.follow_warmup()


class Clock:
    """Seconds of each phase, including the wait for the slowest rank; those of a phase that comes again add up.

    Its timeline has the waits apart.
    """

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.timeline = Timeline()

    @contextmanager
    def __call__(self, phase: str, activity: str = "") -> Iterator[None]:
        """Time the block as ``phase``, its end in the timeline as that of ``activity``.  A collective."""
        began = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # kernels may still run when the block has returned
        self.timeline.end(activity or phase)
        dist.barrier()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began
        self.timeline.end("wait")

    def metrics(self, batch: Batch, world: World) -> dict[str, float]:
        """Return ``timing/`` in seconds and ``perf/`` in tokens per second over all ranks.  A collective."""
        local_response_tokens = sum(batch.lengths)
        local_tokens = sum(map(len, batch.samples))
        counts = np.array([local_response_tokens, local_tokens])
        response_tokens, all_tokens = sum_over_dp(counts, world.layout)
        metrics = {}
        for phase, seconds in self.seconds.items():
            metrics[f"timing/{phase}"] = seconds
        metrics["timing/iteration"] = time.perf_counter() - self.began
        train_seconds = self.seconds["value"] + self.seconds["update"]
        metrics["perf/train_tokens_per_second"] = all_tokens / train_seconds
        if "generate" in self.seconds:
            metrics["perf/generate_tokens_per_second"] = response_tokens / self.seconds["generate"]
        return metrics


def response_metrics(rollout: Rollout) -> dict[str, float]:
    """Return reward, length and stopping over all ranks, and of each source.  A collective.

    A response without a reward counts in no mean of rewards, and a prompt that was given up in no mean at all.
    ``grading/failed`` counts the responses on which no grader came to a verdict.
    """
    rows = rollout.prompts.rows
    sources = sorted({row.source for row in rows})
    sums = np.zeros((1 + len(sources), 6))  # a row for all responses, then one for each source
    for r in rollout.responses:
        rewarded = float(r.rewarded)
        answered = float(bool(r.tokens))
        entry = np.array(
            [
                rewarded,
                rewarded * r.reward,
                answered,
                len(r.tokens),
                r.stopped,
                r.failed,
            ]
        )
        source_row = 1 + sources.index(rows[r.prompt].source)
        sums[0] += entry
        sums[source_row] += entry
    total = torch.from_numpy(sums)
    dist.all_reduce(total)  # over all ranks: only the leaders of engines have responses
    all_sums, *source_sums = total.tolist()
    rewarded, reward, answered, length, stopped, failed = all_sums
    metrics = {
        "reward/mean": reward / max(rewarded, 1),
        "response/length": length / max(answered, 1),
        "response/stopped": stopped / max(answered, 1),
        "grading/failed": failed,
    }
    # A single source has the means of all responses, which are there already.
    if len(sources) > 1:
        for source, entry in zip(sources, source_sums, strict=True):
            metrics |= _source_metrics(source, entry)
    return metrics


def _source_metrics(source: str, sums: Sequence[float]) -> dict[str, float]:
    """Return the metrics of one source; no mean over none.

    Args:
        source: its name.
        sums: the row of the source in `response_metrics`.
    """
    rewarded, reward, answered, length, stopped, failed = sums
    metrics = {f"grading/failed/source/{source}": failed}
    if rewarded:
        metrics[f"reward/source/{source}"] = reward / rewarded
    if answered:
        metrics[f"response/length/source/{source}"] = length / answered
        metrics[f"response/stopped/source/{source}"] = stopped / answered
    return metrics
