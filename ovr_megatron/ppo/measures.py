"""Compute what an iteration is watched by besides its losses: rewards, lengths, repetition, MFU, sample texts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from ovr_megatron.engine import Engine
from ovr_megatron.families import ModelShape
from ovr_megatron.model.flops import training_flops
from ovr_megatron.ppo.batch import Response
from ovr_megatron.ppo.experience import Experience, Models, sum_over_dp
from ovr_megatron.ppo.rollouts import Rollout
from ovr_megatron.ppo.sources import source_names
from ovr_megatron.runtime.exchange import gather_objects

PERCENTILES = (50, 90, 99)
SHOWN_CHARACTERS = 2000  # of a sample text


class ResponseSummary(NamedTuple):
    """What the spread of responses is computed from: prompt, reward, length in tokens, `repetition` of one."""

    prompt: int
    reward: float
    length: int
    repetition: float


def spread_metrics(rollout: Rollout) -> dict[str, float]:
    """Return how rewards and lengths are spread over the responses of all ranks, and of each source.  A collective.

    ``response/reward_std`` is over all responses, ``response/mixed_prompts`` the share of prompts whose responses
    differ in reward: only these tell the policy anything by comparison.  Lengths are in tokens.
    ``response/repetition`` is the mean of `repetition`.
    """
    local_responses = []
    for r in rollout.responses:
        if r.tokens:
            local_responses.append(ResponseSummary(r.prompt, r.reward, len(r.tokens), repetition(r.tokens)))
    ranks = gather_objects(local_responses)  # not reduced: a percentile needs every length
    responses = list(chain.from_iterable(ranks))
    if not responses:
        return {}
    metrics = _describe_spread(responses)
    rows = rollout.prompts.rows
    for source in source_names(rows):
        of_source = [r for r in responses if rows[r.prompt].source == source]
        if of_source:
            for name, value in _describe_spread(of_source).items():
                metrics[f"{name}/source/{source}"] = value
    return metrics


def _describe_spread(responses: Sequence[ResponseSummary]) -> dict[str, float]:
    """Return the metrics of `spread_metrics` of ``responses``, at least one."""
    rewards_of_prompt: dict[int, set[float]] = defaultdict(set)
    for r in responses:
        rewards_of_prompt[r.prompt].add(r.reward)
    mixed_prompts = sum(len(distinct) > 1 for distinct in rewards_of_prompt.values())
    lengths = [r.length for r in responses]
    metrics = {
        "response/reward_std": float(np.std([r.reward for r in responses])),
        "response/mixed_prompts": mixed_prompts / len(rewards_of_prompt),
        "response/repetition": float(np.mean([r.repetition for r in responses])),
    }
    for percentile in PERCENTILES:
        tokens = np.percentile(lengths, percentile)
        metrics[f"response/length_p{percentile}"] = float(tokens)
    metrics["response/length_max"] = float(max(lengths))
    return metrics


def repetition(tokens: Sequence[int]) -> float:
    """Return the share of the 4-grams of ``tokens`` that stand further to the left as well; 0 of fewer than 4 tokens.

    It is seq-rep-4 of Welleck et al. 2020, "Neural text generation with unlikelihood training": 0 where every 4-gram
    is new, nearly 1 in a loop.  Unlike `ovr_megatron.rewards.repetition.repeatness` it takes a sort of n numbers alone.
    """
    if len(tokens) < 4:
        return 0.0
    ids = np.asarray(tokens, np.int64)
    pairs = ids[:-1] * (ids.max() + 1) + ids[1:]
    # Ranks in the place of pairs, so that two of them fit into 64 bits.
    distinct_pairs, ranks = np.unique(pairs, return_inverse=True)
    fours = ranks[:-2].astype(np.int64) * len(distinct_pairs) + ranks[2:]
    return 1.0 - len(np.unique(fours)) / len(fours)


def update_flops(models: Models, experience: Experience, iteration: int) -> float:
    """Return the model FLOP of values, scores and updates over all ranks.  A collective.

    Recomputation does not count.  A forward pass counts a third of a training pass.  The critic's head is one column.
    """
    algorithm = models.config.algorithm
    training_pass = _training_pass_flops(models, experience, models.policy.shape)
    updates = 0
    if models.warmup.trains_policy(iteration):
        updates = algorithm.policy_epochs
    # Those that were made: none is for a loss that the policy does not learn from.
    scoring_passes = (experience.old is not None) + (experience.reference is not None)
    flops = training_pass * (updates + scoring_passes / 3)
    if models.critic is not None:
        shape = models.critic.shape
        critic_training_pass = _training_pass_flops(models, experience, shape) - _head_flops(models, experience, shape)
        flops += critic_training_pass * (1 + 1 / 3)
    if models.teacher is not None and experience.teacher is not None:
        flops += _teacher_flops(models.teacher, experience)
    total = sum_over_dp(np.array([flops]), models.world.layout)
    return float(total[0])


def _training_pass_flops(models: Models, experience: Experience, shape: ModelShape) -> float:
    """Return the FLOP of one training pass of a policy of ``shape`` over the samples of this rank."""
    model = models.config.model
    work = experience.batch.work()
    trains = (model.trains_language, model.trains_vision, model.trains_merger, model.adapts_vision)
    return training_flops(shape, work.lengths, work.grids, *trains, prefixes=work.prefixes)


def _teacher_flops(teacher: Engine, experience: Experience) -> float:
    """Return the FLOP of the teacher's forward pass over the samples of this rank."""
    work = experience.batch.work()
    # Of a model that trains as a whole the forward pass is a third.
    training_pass = training_flops(teacher.shape, work.lengths, work.grids, True, True, True, prefixes=work.prefixes)
    return training_pass / 3


def _head_flops(models: Models, experience: Experience, shape: ModelShape) -> float:
    """Return the FLOP by which a policy's head exceeds a critic's of the same ``shape`` in a training pass."""
    # A frozen head has a forward pass and the gradient of its input, 2 FLOP each for a weight and token; one that
    # trains has the gradient of its weights as well.
    flops_per_weight = 6.0 if models.config.model.trains_language else 4.0
    missing_columns = shape.vocab - 1
    tokens = sum(experience.batch.work().lengths)
    return flops_per_weight * shape.hidden * missing_columns * tokens


def mfu_metrics(
    models: Models,
    experience: Experience,
    iteration: int,
    metrics: dict[str, float],
    peak_flops: float,
) -> dict[str, float]:
    """Return rate and utilisation of values and update, ``timing/value`` and ``timing/update``.  A collective.

    Args:
        models: those that train.
        experience: of this rank.
        iteration: from 0.
        metrics: of the iteration, with its seconds.
        peak_flops: FLOP per second of one device.
    """
    flops = update_flops(models, experience, iteration)
    seconds = metrics["timing/value"] + metrics["timing/update"]
    flops_per_gpu = flops / seconds / models.world.size
    return {
        "perf/tflops_per_gpu": flops_per_gpu / 1e12,
        "perf/mfu": flops_per_gpu / peak_flops,
    }


def sample_texts(responses: Sequence[Response]) -> dict[str, str]:
    """Return the first right and the first wrong response to read, cut to `SHOWN_CHARACTERS` and safe to show."""
    texts = {}
    for r in responses:
        name = "wrong"
        if r.reward > 0:
            name = "right"
        if r.tokens and name not in texts:
            heading = f"reward {r.reward:g}, {len(r.tokens)} tokens, {r.verdict}"
            texts[name] = f"{heading}\n{to_printable(r.text)}"
    return texts


def to_printable(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """Cut ``text`` to ``limit`` characters and replace those that are not printable, but for line ends, by U+FFFD.

    A terminal or a page would take control characters as commands.
    """
    characters = []
    for c in text[:limit]:
        is_harmless = c.isprintable() or c == "\n"
        characters.append(c if is_harmless else "\ufffd")
    printable = "".join(characters)
    if len(text) <= limit:
        return printable
    missing = len(text) - limit
    return f"{printable} ... ({missing:,} more characters)"
