"""Measure how much older than the policy the tokens are that it trains on."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ovr_megatron.ppo.batch import Response
from ovr_megatron.runtime.exchange import gather_objects


def staleness_metrics(responses: Iterable[Response], iteration: int, max_staleness: int) -> dict[str, float]:
    """Return the mean staleness of the tokens of ``responses`` over all ranks, and the share of each.  A collective.

    The staleness of a token is ``iteration`` minus its version.

    Args:
        responses: those of this rank that are trained on.
        iteration: that of the current policy.
        max_staleness: the largest that occurs.
    """
    local_counts = np.zeros(max_staleness + 1, np.int64)  # tokens by staleness
    for response in responses:
        if response.versions is None:
            local_counts[0] += len(response.tokens)
        else:
            local_counts += np.bincount(iteration - response.versions, minlength=max_staleness + 1)
    counts = np.sum(gather_objects(local_counts), axis=0)
    shares = counts / max(counts.sum(), 1)
    metrics = {"rollout/staleness_mean": float(shares @ np.arange(max_staleness + 1))}
    for staleness, share in enumerate(shares):
        metrics[f"rollout/staleness_share/{staleness}"] = float(share)
    return metrics
