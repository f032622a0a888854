"""Follow the length curriculum: how long prompt and response together may be at each iteration."""

from __future__ import annotations

from collections.abc import Sequence

from ovr_megatron.config import StageConfig


def max_tokens(stages: Sequence[StageConfig], iteration: int) -> int:
    """Return the limit of ``iteration`` (counted from 0): that of the first stage whose ``until`` is not yet passed.

    The paper's stages are 24k for the first 300 iterations, 32k up to 700, 48k after.
    """
    return next(stage.max_tokens for stage in stages if iteration < stage.until)


def stage_starts(stages: Sequence[StageConfig]) -> list[int]:
    """Return the first iteration of each stage: where the stage before it ends."""
    starts = [0]
    for stage in stages[:-1]:
        starts.append(stage.until)
    return starts
