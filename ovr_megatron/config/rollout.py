"""Settings of vLLM."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from ovr_megatron.config.checks import ZeroMeans, require
from ovr_megatron.config.fields import Count, NonNegativeFloat, PositiveFloat, PositiveInt, section
from ovr_megatron.config.sampling import PositiveTemperature


@section("rollout.")
class RolloutConfig:
    """vLLM: its layout, its memory and how it samples."""

    tp: PositiveInt = 1
    """Tensor-parallel size of an engine."""
    ranks: Annotated[Count, ZeroMeans("all train and generate in turn")] = 0
    """Ranks of the job, the last ones, that only generate; the others only train."""
    stream_parts: Annotated[Count, ZeroMeans("training begins when all responses are there")] = 0
    """About how many parts the responses of an iteration come in to the ranks that train, which compute the gradients
    of a part while others are generated; the optimizer step waits for the last. It needs rollout.ranks, one step an
    iteration, and advantages that depend on no other prompt's responses."""
    schedule: Literal["static", "shared"] = "static"
    """Prompts of an engine: the same number at the start, so that a repeated run draws the same batches (static), or
    the next one when it has room, which ends sooner where lengths differ (shared)."""
    oversample: Annotated[NonNegativeFloat, ZeroMeans("off")] = 0.0
    """Share of prompts that are started beyond those of an iteration, which ends when enough are answered; the others
    are generated anew in a later iteration of long responses, or with rollout.max_staleness continued in the next."""
    max_staleness: Annotated[Count, ZeroMeans("the current one alone")] = 0
    """Largest age in iterations of a token that is trained on. Without rollout.ranks it needs rollout.oversample:
    unfinished responses continue under the new weights. With rollout.ranks alone generation runs so many iterations
    ahead of training. With both it runs one ahead, a response may span max_staleness - 1 updates, and the value is 0 or
    at least 2."""
    extra_responses: Annotated[Count, ZeroMeans("off")] = 0
    """Responses to each prompt that are started beyond those that are trained on. The first to be finished are taken,
    the others given up: short responses are taken more often than the policy gives them, and the policy learns that."""
    temperature: PositiveTemperature = 1.0
    """Temperature of sampling."""
    top_p: NonNegativeFloat = 1.0
    """Nucleus of sampling; 1 alone is possible."""
    max_num_seqs: PositiveInt = 256
    """Responses that an engine generates at the same time."""
    max_model_len: Annotated[Count, ZeroMeans("the curriculum's longest limit")] = 0
    """Tokens of a prompt and its response together for which the engine is built."""
    kv_cache_gib: Annotated[NonNegativeFloat, ZeroMeans("by gpu_memory_utilization")] = 0.0
    """Size of the KV cache in GiB."""
    # Below 1: the trainer's process has memory of its own on the GPU, also with offload.
    gpu_memory_utilization: Annotated[float, Field(ge=0, lt=1), ZeroMeans("a half; 0.85 with offload or ranks")] = 0.0
    """vLLM's share of the GPU while it generates; with offload=true the trainer's models leave the GPU meanwhile."""
    stop: list[str] = field(default_factory=list)
    """Texts that end a response."""
    enforce_eager: bool | None = None
    """Run vLLM without compiling its model and without CUDA graphs; null: true on a CPU, false on a GPU. On a CPU false
    makes steps shorter, but the start takes seconds more and needs a C++ compiler."""
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
        require(
            self.ranks % self.tp == 0,
            f"rollout.ranks={self.ranks} is no multiple of rollout.tp={self.tp}, the ranks of an engine; change one of "
            "them",
        )
        require(
            not (self.ranks and self.oversample and self.max_staleness == 1),
            f"rollout.max_staleness=1 and rollout.oversample={self.oversample:g} with rollout.ranks={self.ranks}: "
            "responses are an iteration old when the other ranks get them, so that none could be continued; set "
            "rollout.max_staleness to 2 or more, or one of the two to 0",
        )
        require(
            self.ranks > 0 or not self.max_staleness or self.oversample > 0,
            f"rollout.max_staleness={self.max_staleness} continues responses that a round left unfinished, and without "
            "rollout.oversample a round finishes all; set rollout.oversample above 0, as 0.5, or let rollout.ranks "
            "generate ahead",
        )
        require(
            not (self.max_staleness and self.extra_responses),
            f"rollout.max_staleness={self.max_staleness} keeps the long responses that "
            f"rollout.extra_responses={self.extra_responses} gives up; set one of them to 0",
        )

        _check_parts(self)

    @property
    def rounds_ahead(self) -> int:
        """Return how many iterations the ranks that only generate run ahead of those that train."""
        if not self.ranks:
            return 0
        return min(self.max_staleness, 1) if self.oversample else self.max_staleness

    @property
    def continues_responses(self) -> bool:
        """Return whether unfinished responses continue in the next round."""
        return self.oversample > 0 and self.max_staleness > self.rounds_ahead

    def memory_share(self, offload: bool) -> float:
        """Return the share of the GPU that vLLM takes.

        With ``offload`` the trainer's models leave it meanwhile, and with ``rollout.ranks`` there are none.
        """
        return self.gpu_memory_utilization or (0.85 if offload or self.ranks else 0.5)


def _check_parts(rollout: RolloutConfig) -> None:
    """Raise `ConfigError` if the responses of an iteration cannot come in parts."""
    if not rollout.stream_parts:
        return
    setting = f"rollout.stream_parts={rollout.stream_parts}"
    require(
        rollout.ranks > 0,
        f"{setting} needs ranks that generate while others train; set rollout.ranks, or rollout.stream_parts=0",
    )
    require(
        not rollout.max_staleness,
        f"{setting} with rollout.max_staleness={rollout.max_staleness}: the responses are there before the ranks that "
        "train are; set one of them to 0",
    )
    require(
        not rollout.oversample,
        f"{setting} with rollout.oversample={rollout.oversample:g}: only the end of the round says which prompts it "
        "trains on; set one of them to 0",
    )
