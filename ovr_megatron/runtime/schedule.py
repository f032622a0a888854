"""Learning rates over the steps of a run."""

from __future__ import annotations

import math

from ovr_megatron.config import OptimizerConfig


def learning_rate(step: int, total: int, config: OptimizerConfig) -> float:
    """Return the rate of optimizer step ``step`` (from 0) of ``total``: linear warm-up, then ``config.schedule``.

    ``wsd`` (warm-up, stable, decay; MiniCPM, arXiv 2404.06395) is constant but for a linear decay over the last
    ``decay_share`` of ``total``.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, total - config.warmup_steps))
    decay_steps = config.decay_share * total
    # Of the way from the lowest rate up to `lr`.
    scale = {
        "constant": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "wsd": min(1.0, max(0.0, (total - step) / decay_steps)),
    }[config.schedule]
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * scale)
