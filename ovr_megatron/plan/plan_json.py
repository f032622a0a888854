"""Types of a plan as JSON: sizes in bytes, times in seconds or, where the name says so, hours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from ovr_megatron.config.model import Recompute


class PlannedModel(TypedDict):
    """The model: its folder or preset, and its parameters by part."""

    path: str
    parameters: dict[str, int]


class PlannedLayout(TypedDict):
    """The recipe's layout: the fields of `ParallelConfig`, and the kind of recomputation."""

    parallel: Mapping[str, Any]
    recompute: Recompute


class PlannedRank(TypedDict):
    """One model on a rank of one pipeline stage, as in `ModelState`."""

    model: str
    stage: int
    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int


class PlannedPhase(TypedDict):
    """A phase on the pipeline stage that needs most in it."""

    name: str
    stage: int
    items: dict[str, int]
    total: int


class PlannedPatches(TypedDict):
    """Patches of a pack: those of the expected images, and those that fit; None: any number does."""

    expected: int
    room: int | None


class PlannedSource(TypedDict):
    """A finite source, as in `SourceUse`."""

    name: str
    rows: int
    epochs: float


class PlannedCandidate(TypedDict):
    """A layout of the search, as in `search.Candidate` and `search.SearchedLayout`."""

    parallel: Mapping[str, Any]
    recompute: Recompute
    rollout_tp: int | None
    offload: bool | None
    bytes: int
    hours: float
    reason: str


class PlannedSpan(TypedDict):
    """Steps of one limit of length; ``told`` says where the samples are known from, ``parts`` are seconds."""

    steps: int
    mean_tokens: float
    attention_length: float
    patches: float
    told: str
    limit: int
    tokens: float
    micro_batches: int
    flops: float
    seconds: float
    parts: dict[str, float]


class PlannedEngine(TypedDict):
    """The rollout engines: the tokens that one's cache holds, the longest sequence in tokens, and their number."""

    cache_tokens: int
    longest: int
    engines: int


class Plan(TypedDict):
    """A plan as JSON; sizes in bytes, times in seconds or, where the name says so, hours.

    ``best_command`` runs the fastest of ``candidates``; None where none fits, or there was no search.
    """

    model: PlannedModel
    gpu: Mapping[str, Any]
    world: int
    replicas: int
    layout: PlannedLayout
    rank: list[PlannedRank]
    phases: list[PlannedPhase]
    fits: bool
    patches_of_a_pack: PlannedPatches
    engine: PlannedEngine | None
    spans: list[PlannedSpan]
    sources: list[PlannedSource]
    tokens: float
    steps: int
    flops: float
    bubble: float
    at_mfu: dict[str, float]
    by_cost_model: dict[str, float]
    checkpoint_bytes: int
    checkpoints_kept: int
    candidates: list[PlannedCandidate] | None
    best_command: str | None
