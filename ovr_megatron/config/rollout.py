"""Settings of vLLM: rollouts, and evaluations of the live weights."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ovr_megatron.config.checks import choice, require
from ovr_megatron.config.data import SourceConfig


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """vLLM: its layout, its memory and how it samples.

    ``schedule``: ``static`` gives every engine the same number of prompts at the start, so that a repeated run draws
    the same batches; with ``shared`` each engine takes the next prompt when it has room, which ends sooner where
    lengths differ.  ``mismatch_warning``: warn of an iteration in which the log-probabilities of engine and trainer
    differ by more than this on a hundredth of the tokens.  ``bucket_mib``: new weights travel to the engines in buckets
    of this size, two at a time; ``check_updates`` compares checksums of every slice.  With ``async_scheduling=false``
    vLLM plans a step on a GPU only after the step before (on a CPU it always does).  ``gpu_memory_utilization``: vLLM's
    share of the GPU while it generates; 0: a half, and 0.85 where the trainer's models are offloaded meanwhile.
    """

    tp: int = 1
    schedule: str = "static"
    temperature: float = 1.0
    top_p: float = 1.0
    max_num_seqs: int = 256
    max_model_len: int = 0
    kv_cache_gib: float = 0.0
    gpu_memory_utilization: float = 0.0
    stop: list[str] = field(default_factory=list)
    enforce_eager: bool = False
    async_scheduling: bool = True
    mismatch_warning: float = 0.05
    bucket_mib: float = 256.0
    check_updates: bool = False

    def __post_init__(self) -> None:
        require(
            0 <= self.gpu_memory_utilization < 1,
            f"rollout.gpu_memory_utilization={self.gpu_memory_utilization} must be a share of the GPU below 1, or 0: "
            "half of it, and 0.85 with offload=true",
        )
        require(self.bucket_mib > 0, f"rollout.bucket_mib={self.bucket_mib} must be positive")
        require(self.temperature > 0, f"rollout.temperature={self.temperature} must be positive")
        require(
            self.top_p == 1.0,
            f"rollout.top_p={self.top_p}: the trainer scores the whole distribution, so sampling must too; use 1.0",
        )
        choice("rollout.schedule", self.schedule, ("static", "shared"))
        require(self.tp >= 1, f"rollout.tp={self.tp} must be at least 1")

    def memory_share(self, offload: bool) -> float:
        """Return the share of the GPU that vLLM takes; with ``offload`` the trainer's models leave it meanwhile."""
        return self.gpu_memory_utilization or (0.85 if offload else 0.5)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Problem sets that the live weights answer every ``every`` steps or iterations, and at the end (0: never).

    ``limit`` takes the first problems of each set (0: all).  Greedy responses of at most ``max_tokens`` are scored (0:
    the model's positions less ``data.max_prompt_tokens``, at most 32,768, as in ``tools/evaluate.py``); ``samples``
    more responses at temperature 1 give pass@k.  ``workers`` processes grade.
    """

    every: int = 0
    sources: list[SourceConfig] = field(default_factory=list)
    limit: int = 0
    max_tokens: int = 0
    samples: int = 0
    workers: int = 2

    def __post_init__(self) -> None:
        for key in ("every", "limit", "max_tokens", "samples"):
            require(getattr(self, key) >= 0, f"evaluation.{key}={getattr(self, key)} must be 0 or more")
        require(self.workers > 0, f"evaluation.workers={self.workers} must be positive")
        require(
            not self.every or bool(self.sources),
            f"evaluation.every={self.every} has nothing to ask: give evaluation.sources=[{{path: FILE, name: NAME}}]",
        )
        names = [source.name or "" for source in self.sources]
        for source, name in zip(self.sources, names, strict=True):
            require(
                bool(re.fullmatch(r"[\w.-]+", name)),
                f"evaluation.sources: {source.path} is called {name!r}; give it a name of letters, digits, - _ or .",
            )
            require(names.count(name) == 1, f"evaluation.sources: two sets are called {name}; name one of them anew")
