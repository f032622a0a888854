"""What a person wants to know of an iteration besides its losses: spread of rewards and lengths, MFU, sample texts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch.distributed as dist

from ovr_megatron.model.flops import training_flops
from ovr_megatron.ppo.batch import Response
from ovr_megatron.ppo.experience import Experience, Models, sum_over_dp
from ovr_megatron.ppo.rollouts import Rollout

PERCENTILES = (50, 90, 99)
SHOWN_CHARACTERS = 2000  # of a sample text


def spread_metrics(rollout: Rollout) -> dict[str, float]:
    """Return how rewards and lengths are spread over the responses of all ranks; a collective.

    ``response/reward_std`` is over all responses, ``response/mixed_prompts`` the share of prompts whose responses
    differ in reward: only these tell the policy anything by comparison.  Lengths are in tokens.
    """
    local = [(r.prompt, r.reward, len(r.tokens)) for r in rollout.responses if r.tokens]
    ranks: list[list[tuple[int, float, int]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(ranks, local)
    everything = [item for part in ranks for item in part]
    if not everything:
        return {}
    rewards, lengths = np.array([item[1] for item in everything]), np.array([item[2] for item in everything])
    by_prompt: dict[int, set[float]] = defaultdict(set)
    for prompt, reward, _ in everything:
        by_prompt[prompt].add(reward)
    return {
        "response/reward_std": float(rewards.std()),
        "response/mixed_prompts": sum(len(group) > 1 for group in by_prompt.values()) / len(by_prompt),
        **{f"response/length_p{p}": float(np.percentile(lengths, p)) for p in PERCENTILES},
        "response/length_max": float(lengths.max()),
    }


def update_flops(models: Models, experience: Experience, iteration: int) -> float:
    """Return the model FLOP of values, scores and updates over all ranks; a collective.  Recomputation does not count.

    A pass forward counts a third of a training pass.  The critic's head is one column, but its layers are the policy's.
    """
    samples, algorithm = experience.batch.samples, models.config.algorithm
    lengths = [len(sample) for sample in samples]
    grids = [grid for sample in samples for grid in sample.grid_thw.tolist()]
    model, shape = models.config.model, models.policy.shape
    once = training_flops(shape, lengths, grids, not model.freeze_language, not model.freeze_vision)
    updates = algorithm.policy_epochs if iteration >= algorithm.critic_warmup_iterations else 0
    flops = once * (updates + algorithm.scoring_passes / 3)
    if models.critic is not None:
        head = (6.0 if not model.freeze_language else 4.0) * shape.hidden * (shape.vocab - 1) * sum(lengths)
        flops += (once - head) * (1 + 1 / 3)
    return float(sum_over_dp(np.array([flops]), models.world.layout)[0])


def mfu_metrics(
    models: Models, experience: Experience, iteration: int, metrics: dict[str, float], peak_flops: float
) -> dict[str, float]:
    """Return rate and utilisation of values and update, ``timing/value`` and ``timing/update``; a collective.

    Args:
        models: what is trained.
        experience: of this rank.
        iteration: from 0.
        metrics: of the iteration, with its seconds.
        peak_flops: FLOP per second of one device.
    """
    flops = update_flops(models, experience, iteration)
    each = flops / (metrics["timing/value"] + metrics["timing/update"]) / models.world.size
    return {"perf/tflops_per_gpu": each / 1e12, "perf/mfu": each / peak_flops}


def sample_texts(responses: Sequence[Response]) -> dict[str, str]:
    """Return the first right and the first wrong response to read, cut to `SHOWN_CHARACTERS` and safe to show."""
    texts = {}
    for r in responses:
        name = "right" if r.reward > 0 else "wrong"
        if r.tokens and name not in texts:
            texts[name] = f"reward {r.reward:g}, {len(r.tokens)} tokens, {r.verdict}\n{shown(r.text)}"
    return texts


def shown(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """Return at most ``limit`` characters of ``text``; what is no printable character becomes U+FFFD.

    A terminal or a page would take control characters as commands.
    """
    cut = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text[:limit])
    return cut + (f" ... ({len(text) - limit:,} more characters)" if len(text) > limit else "")
