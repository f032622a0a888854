"""Settings of vLLM: rollouts, and evaluations of the live weights."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from ovr_megatron.config.checks import ZeroMeans, require
from ovr_megatron.config.data import SourceConfig
from ovr_megatron.config.fields import Count, NonNegativeFloat, PositiveFloat, PositiveInt, section


@section("rollout.")
class RolloutConfig:
    """vLLM: its layout, its memory and how it samples."""

    tp: PositiveInt = 1
    """Tensor-parallel size of an engine."""
    schedule: Literal["static", "shared"] = "static"
    """Prompts of an engine: the same number at the start, so that a repeated run draws the same batches (static), or
    the next one when it has room, which ends sooner where lengths differ (shared)."""
    temperature: PositiveFloat = 1.0
    """Temperature of sampling."""
    top_p: NonNegativeFloat = 1.0
    """Nucleus of sampling; 1 alone is possible."""
    max_num_seqs: Count = 256
    """Responses that an engine generates at the same time."""
    max_model_len: Annotated[Count, ZeroMeans("the curriculum's longest limit")] = 0
    """Tokens of a prompt and its response together for which the engine is built."""
    kv_cache_gib: Annotated[NonNegativeFloat, ZeroMeans("by gpu_memory_utilization")] = 0.0
    """Size of the KV cache in GiB."""
    # Below 1: the trainer's process has memory of its own on the GPU, also with offload.
    gpu_memory_utilization: Annotated[float, Field(ge=0, lt=1), ZeroMeans("a half; 0.85 with offload=true")] = 0.0
    """vLLM's share of the GPU while it generates; with offload=true the trainer's models leave the GPU meanwhile."""
    stop: list[str] = field(default_factory=list)
    """Texts that end a response."""
    enforce_eager: bool = False
    """Run vLLM without CUDA graphs."""
    async_scheduling: bool = True
    """Plan a step on a GPU during the step before; on a CPU it is planned after it."""
    mismatch_warning: NonNegativeFloat = 0.05
    """Warn of an iteration in which the log-probabilities of engine and trainer differ by more than this on a hundredth
    of the tokens."""
    bucket_mib: PositiveFloat = 256.0
    """Size in MiB of the buckets in which new weights travel to the engines, two at a time."""
    check_updates: bool = False
    """Compare checksums of every slice of new weights."""

    def __post_init__(self) -> None:
        require(
            self.top_p == 1.0,
            f"rollout.top_p={self.top_p}: the trainer scores the whole distribution, so sampling must too; use 1.0",
        )

    def memory_share(self, offload: bool) -> float:
        """Return the share of the GPU that vLLM takes; with ``offload`` the trainer's models leave it meanwhile."""
        return self.gpu_memory_utilization or (0.85 if offload else 0.5)


@section("evaluation.")
class EvaluationConfig:
    """Problem sets that the live weights answer during training."""

    every: Annotated[Count, ZeroMeans("never")] = 0
    """Steps or iterations between evaluations; another is at the end."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Problem sets, each with a name."""
    limit: Annotated[Count, ZeroMeans("all")] = 0
    """First problems of each set."""
    max_tokens: Annotated[Count, ZeroMeans("the model's positions less data.max_prompt_tokens, at most 32,768")] = 0
    """Tokens of a greedy response, as in ovr evaluate."""
    samples: Count = 0
    """More responses at temperature 1, which give pass@k."""
    workers: PositiveInt = 2
    """Processes that grade."""

    def __post_init__(self) -> None:
        require(
            not self.every or bool(self.sources),
            f"evaluation.every={self.every} has nothing to ask: give evaluation.sources=[{{path: FILE, name: NAME}}]",
        )
        names = [source.name or "" for source in self.sources]
        for source, name in zip(self.sources, names, strict=True):
            # Files and metrics of a set carry its name.
            require(
                bool(re.fullmatch(r"[\w.-]+", name)),
                f"evaluation.sources: {source.path} is called {name!r}; give it a name of letters, digits, - _ or .",
            )
            require(names.count(name) == 1, f"evaluation.sources: two sets are called {name}; name one of them anew")
