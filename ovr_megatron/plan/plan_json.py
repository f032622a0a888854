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
    """One model on a rank of one pipeline stage, as in `ModelState`; weights that two models share count once."""

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


class PlannedRound(TypedDict):
    """A round of a simulated timeline, in seconds from its begin.

    ``engine_end_s`` has the end of each engine, ``train_s`` begin and end of the training on each part of its
    responses, the last with what follows it, ``updates_behind`` the updates that its weights lack of those before the
    one that trains on it; ``long`` says that its prompts are postponed ones.
    """

    begin_s: float
    engine_end_s: list[float]
    graded_s: float
    train_begin_s: float
    train_end_s: float
    train_s: list[tuple[float, float]]
    updates_behind: int
    long: bool


class PlannedMode(TypedDict):
    """A way of generating (`ovr_megatron.plan.modes.Mode`), simulated; seconds are means of its ``iterations``.

    ``engine_idle`` is the share of generation that engines wait for the last one, ``gpu_idle`` the share of all ranks'
    time in which they neither generate nor train, ``stale`` the share of the response tokens that an older policy
    generated, ``discarded`` that of the generated tokens which are generated again, ``gain`` the iteration of the
    shared queue over this one.  ``rounds`` are the last ones.
    """

    name: str
    schedule: str
    oversample: float
    staleness: int
    generators: int
    parts: int
    world: int
    engines: int
    iterations: int
    generate_s: float
    engine_idle: float
    iteration_s: float
    gpu_idle: float
    stale: float
    discarded: float
    gain: float
    rounds: list[PlannedRound]


class PlannedSimulation(TypedDict):
    """The simulated iterations: where the lengths are known from, an engine's rates and room, and each way."""

    lengths: str
    limit: int
    prompts: int
    responses: int
    slots: int
    tp: int
    rates: dict[str, float]
    modes: list[PlannedMode]


class Plan(TypedDict):
    """A plan as JSON; sizes in bytes, times in seconds or, where the name says so, hours.

    ``best_command`` runs the fastest of ``candidates``; None where none fits, or there was no search.  ``simulation``
    is None where none was asked for.
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
    simulation: PlannedSimulation | None
