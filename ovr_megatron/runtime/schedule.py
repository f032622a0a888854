"""Learning rates over the steps of a run."""

from __future__ import annotations

import math

from ovr_megatron.config import OptimizerConfig


def learning_rate(step: int, total: int, config: OptimizerConfig) -> float:
    """Rate of optimizer step ``step`` (from 0) of ``total``: linear warm-up, then what ``schedule`` names.

    ``wsd`` (warm-up, stable, decay; MiniCPM, arXiv 2404.06395) is constant but for a linear decay over the last
    ``decay_share`` of ``total``.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = min(1.0, (step - config.warmup_steps) / max(1, total - config.warmup_steps))
    decay = config.decay_share * total
    left = {
        "constant": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "linear": 1 - done,
        "wsd": min(1.0, max(0.0, (total - step) / decay)),
    }[config.schedule]
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)
