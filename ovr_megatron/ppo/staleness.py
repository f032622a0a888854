"""Measure how much older than the policy the tokens are that it trains on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ovr_megatron.ppo.advantages import Ragged
from ovr_megatron.ppo.batch import Response
from ovr_megatron.runtime.exchange import gather_objects


def token_staleness(responses: Sequence[Response], iteration: int) -> Ragged:
    """Return the iterations from the weights that drew each token of a response to those of ``iteration`` [n]."""
    arrays = []
    for response in responses:
        versions = response.versions
        if versions is None:
            versions = np.full(len(response.tokens), iteration)
        arrays.append((iteration - versions).astype(np.float64))
    return arrays


def has_older_tokens(responses: Sequence[Response], max_staleness: int) -> bool:
    """Return whether tokens of any rank may be older than the policy.  A collective.

    Args:
        responses: of this rank.
        max_staleness: ``rollout.max_staleness``.
    """
    # All ranks or none: those that share a pack, and the sums of all packs, must have the same arrays.
    has_versions = any(response.versions is not None for response in responses)
    return max_staleness > 0 or any(gather_objects(has_versions))


def staleness_metrics(staleness: Ragged, ages: int) -> dict[str, float]:
    """Return the mean staleness of the tokens of all ranks, and the share of each age.  A collective.

    Args:
        staleness: of this rank's responses, as of `token_staleness`.
        ages: number of shares at least, from age 0; more where tokens are older.
    """
    local_ages = np.concatenate([np.zeros(0), *staleness]).astype(np.int64)
    ranks = gather_objects(np.bincount(local_ages, minlength=ages))
    counts = np.zeros(max(map(len, ranks)), np.int64)  # tokens by age
    for rank_counts in ranks:
        counts[: len(rank_counts)] += rank_counts
    shares = counts / max(counts.sum(), 1)
    metrics = {"rollout/staleness_mean": float(shares @ np.arange(len(shares)))}
    for age, share in enumerate(shares):
        metrics[f"rollout/staleness_share/{age}"] = float(share)
    return metrics
