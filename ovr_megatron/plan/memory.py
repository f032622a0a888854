"""Memory of the fullest rank in every phase of a recipe, item by item in bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from ovr_megatron.config import ColdStartConfig, ModelConfig, ParallelConfig, RLConfig, RolloutConfig
from ovr_megatron.families import ModelShape
from ovr_megatron.plan.activations import Activations, activations
from ovr_megatron.plan.hardware import Gpu
from ovr_megatron.plan.parameters import (
    DTYPE_BYTES,
    MASTER_BYTES,
    MOMENT_BYTES,
    ModelState,
    count_parameters,
    model_state,
    rank_parameters,
)
from ovr_megatron.plan.scenario import Scenario

_GIB = 1 << 30
CONTEXT = int(1.5 * _GIB)  # CUDA context, libraries' kernels and workspaces
GROUP = _GIB // 4  # NCCL's buffers for each process group of more than one rank
MARGIN = 0.05  # of the GPU's memory, for fragmentation
GRAPHS = _GIB  # vLLM's captured graphs, which stay while it sleeps unless models are offloaded
_ENGINE_BATCH = 16384  # tokens that vLLM works on at once
_TOWER_ROWS = 6  # rows of the tower's width that a patch has at once in one of its layers, besides the MLP's two


@dataclass(frozen=True)
class Phase:
    """Memory of the fullest rank in one phase, by item."""

    name: str
    stage: int
    items: dict[str, int]

    @property
    def total(self) -> int:
        """Return the bytes of all items."""
        return sum(self.items.values())


def phases(scenario: Scenario) -> list[Phase]:
    """Return every phase, each on the pipeline stage that needs most in it."""
    candidates = _candidate_stages(scenario.config.parallel)
    per_stage = [_stage_phases(scenario, stage) for stage in candidates]
    by_phase = zip(*per_stage, strict=True)
    return [fullest_phase(stages) for stages in by_phase]


def fullest_phase(candidates: Sequence[Phase]) -> Phase:
    """Return the first of the phases that need most."""
    return max(candidates, key=lambda phase: phase.total)


def _candidate_stages(parallel: ParallelConfig) -> list[int]:
    """Return the stages that can be the fullest: the first two and the last."""
    # The first has the tower, the second the most packs in flight of those without it, and the last has the head.
    last = parallel.pp - 1
    return sorted({0, min(1, last), last})


def _stage_phases(scenario: Scenario, stage: int) -> list[Phase]:
    config = scenario.config
    shape = scenario.shape
    overhead = _overhead(scenario)
    state = model_state(shape, scenario.model, config.parallel, scenario.dp, stage)
    if isinstance(config, ColdStartConfig):
        saved = _state_items(state)
        # The largest tensor is put together in float32 from its shards: both are there at once.
        saved["whole tensors"] = 2 * shape.vocab * shape.hidden * 4
        items_by_phase = {
            "train": _training(scenario, stage, state),
            "save": saved,
        }
    else:
        iteration = _IterationPhases(scenario, stage, state)
        items_by_phase = iteration.items_by_phase()
    return [Phase(name, stage, items | overhead) for name, items in items_by_phase.items()]


class _IterationPhases:
    """The phases of one iteration of PPO and its relatives on one pipeline stage; ``policy`` is the policy's state."""

    def __init__(self, scenario: Scenario, stage: int, policy: ModelState):
        config = scenario.config
        shape = scenario.shape
        assert isinstance(config, RLConfig)
        self.scenario = scenario
        self.config = config
        self.stage = stage
        self.models = {"policy": policy}
        fp8_policy = fp8_bytes(shape, scenario.model, config.parallel, stage, False)
        # The reference has the policy's sizes and its layout.
        self.fp8_copies = {"policy": fp8_policy, "reference": fp8_policy}
        if config.algorithm.has_critic:
            critic = scenario.critic_scenario
            layout = critic.config.parallel
            # Of a pipeline of another length the first stage is taken: it has the tower.
            critic_stage = stage if layout.pp == config.parallel.pp else 0
            self.critic = critic
            self.critic_stage = critic_stage
            self.models["critic"] = model_state(
                critic.shape, config.model, layout, critic.dp, critic_stage, critic=True
            )
            self.fp8_copies["critic"] = fp8_bytes(critic.shape, config.model, layout, critic_stage, True)
        self.teacher = scenario.teacher_scenario
        if self.teacher:
            layout = self.teacher.config.parallel
            frozen = self.teacher.model
            self.teacher_stage = stage if layout.pp == config.parallel.pp else 0
            self.models["teacher"] = model_state(
                self.teacher.shape, frozen, layout, self.teacher.dp, self.teacher_stage
            )
            self.fp8_copies["teacher"] = fp8_bytes(self.teacher.shape, frozen, layout, self.teacher_stage, False)

    def items_by_phase(self) -> dict[str, dict[str, int]]:
        config = self.config
        scenario = self.scenario
        algorithm = config.algorithm
        rollout = config.rollout
        has_engine = config.generates and not rollout.ranks
        asleep = _graphs(rollout) if has_engine and not config.offload else {}
        phases = {}
        if config.generates:
            engine = engine_memory(rollout, scenario.shape, scenario.gpu, config.model.dtype, config.offload)
            # Where other ranks have the engines, these have nothing else.
            resident = self._resident() if has_engine else {}
            phases["generate"] = resident | engine
        if algorithm.has_critic:
            values = _forward_items(self.critic, self.critic_stage, True)
            update = _backward_items(self.critic, self.critic_stage, True, algorithm.critic_steps)
            phases["value"] = self._resident("critic") | values | asleep
            phases["update critic"] = self._resident("critic", trains=True) | update | asleep
        resident_policy = self._resident("policy")
        if config.scoring_passes:
            scoring = _forward_items(scenario, self.stage, False)
            phases["log-probabilities"] = resident_policy | scoring | asleep
        if self.teacher:
            scoring = _forward_items(self.teacher, self.teacher_stage, False)
            phases["teacher"] = self._resident("teacher") | scoring | asleep
        if config.trains_policy:
            update = _backward_items(scenario, self.stage, False, algorithm.policy_steps)
            phases["update policy"] = self._resident("policy", trains=True) | update | asleep
        if config.generates:
            weights = {"vLLM weights": engine["vLLM weights"]}
            # Waking vLLM's weights wakes its graphs, too.
            awake = weights | _graphs(rollout) if has_engine else {}
            phases["sync"] = resident_policy | awake | self._sync_buckets() | self._merged_weight()
        return phases

    def _sync_buckets(self) -> dict[str, int]:
        """Return the buckets of an update: while the messages of one travel, the rows of the one before are copied."""
        parallel = self.config.parallel
        model_ranks = parallel.tp * parallel.pp
        size = 0
        if model_ranks > 1 or self.config.rollout.ranks:
            size = int(2 * self.config.rollout.bucket_mib * 2**20)
        return {"buckets": size}

    def _merged_weight(self) -> dict[str, int]:
        """Return the largest weight with its adapter added, beside the float32 sum that it is rounded from."""
        if not self.config.model.lora.rank:
            return {}
        shape = self.scenario.shape
        elements = 2 * shape.ffn * shape.hidden // self.config.parallel.tp
        return {"merged weight": elements * (4 + DTYPE_BYTES[self.config.model.dtype])}

    def _resident(self, *working: str, trains: bool = False) -> dict[str, int]:
        """Return what the models have on the GPU while those of ``working`` run (forward only unless ``trains``)."""
        config = self.config
        policy = self.models["policy"]
        has_reference = config.has_reference
        if not config.offload:
            resident = {name: state.total for name, state in self.models.items()}
            if config.critic_shares_base:
                resident["critic"] = self.models["critic"].without_frozen().total
            if has_reference:
                # The reference never trains: it has neither gradients nor an optimizer.
                resident["reference"] = policy.weights
            return resident | _fp8_items(self.fp8_copies, tuple(resident))
        states = dict(self.models)
        if has_reference:
            states["reference"] = policy
        resident = {}
        for name in working:
            state = states[name]
            resident[name] = state.total if trains else state.weights
        return resident | _fp8_items(self.fp8_copies, working)


def _overhead(scenario: Scenario) -> dict[str, int]:
    """Return what every phase has besides models and activations."""
    config = scenario.config
    parallel = config.parallel
    dp = scenario.dp
    group_sizes = [
        parallel.tp,
        parallel.pp,
        parallel.cp,
        dp,
        dp * parallel.cp,
        scenario.world,
    ]
    if isinstance(config, RLConfig):
        group_sizes.append(config.rollout.tp)
    groups = sum(size > 1 for size in group_sizes)  # a group of one rank sends nothing
    return {
        "CUDA context": CONTEXT,
        "NCCL buffers": groups * GROUP,
        "fragmentation margin": int(MARGIN * scenario.gpu.memory),
    }


def _state_items(state: ModelState) -> dict[str, int]:
    return {
        "weights": state.weights,
        "gradients": state.gradients,
        "optimizer": state.optimizer,
    }


def _activations_by_span(scenario: Scenario, stage: int, critic: bool, share: int) -> list[Activations]:
    config = scenario.config
    by_span = []
    for span in scenario.spans:
        pack = scenario.pack(span)
        packs = scenario.micro_batches(span, share)
        span_activations = activations(scenario.shape, config.model, config.parallel, pack, packs, stage, critic)
        by_span.append(span_activations)
    return by_span


def _forward_items(scenario: Scenario, stage: int, critic: bool) -> dict[str, int]:
    """Return the activations of a pass without gradients, those of the span that needs most."""
    by_span = _activations_by_span(scenario, stage, critic, 1)
    largest = max(span_activations.forward for span_activations in by_span)
    return {"activations": largest}


def _backward_items(scenario: Scenario, stage: int, critic: bool, share: int) -> dict[str, int]:
    """Return the activations of a forward and backward pass, those of the span that needs most."""
    by_span = _activations_by_span(scenario, stage, critic, share)
    largest = max(by_span, key=lambda span_activations: span_activations.peak)
    return {
        "activations kept": largest.saved - largest.vision,
        "vision kept": largest.vision,
        "layer or head at work": largest.working,
    }


def _training(scenario: Scenario, stage: int, state: ModelState) -> dict[str, int]:
    config = scenario.config
    fp8_model = fp8_bytes(scenario.shape, config.model, config.parallel, stage, False)
    copies = _fp8_items({"model": fp8_model}, ("model",))
    backward = _backward_items(scenario, stage, False, 1)
    return _state_items(state) | copies | backward


def fp8_bytes(
    shape: ModelShape,
    model: ModelConfig,
    parallel: ParallelConfig,
    stage: int,
    critic: bool,
) -> int:
    """Return the bytes of the FP8 copies of the layers' matrices, which Transformer Engine keeps from the first pass.

    Two of each on Hopper, row by row and transposed (`_fp8_workspaces` of its modules); their scales are not counted.
    """
    if model.fp8 == "none":
        return 0
    # As in `model_state`: recomputation changes no parameter.
    elements = _count_matrix_elements(shape, replace(model, recompute="none"), parallel, stage, critic)
    # Layers at both ends may stay in bfloat16.  In a pipeline it is not asked which stage has them.
    fp8_share = 1.0
    if parallel.pp == 1:
        fp8_share = 1 - 2 * model.fp8_bf16_layers / shape.layers
    return int(2 * elements * fp8_share)


@lru_cache(maxsize=4096)
def _count_matrix_elements(
    shape: ModelShape,
    model: ModelConfig,
    parallel: ParallelConfig,
    stage: int,
    critic: bool,
) -> int:
    """Count the elements of the layers' matrices of a rank."""
    elements = 0
    for part in rank_parameters(shape, model, parallel, critic, stage):
        for parameter in part:
            in_layer = parameter.name.startswith("decoder.layers.")
            # Norms, whose names end in `layer_norm_weight`, and biases are used as they are.
            if in_layer and parameter.name.endswith(".weight"):
                elements += parameter.numel
    return elements


def _fp8_items(copies: dict[str, int], names: Sequence[str]) -> dict[str, int]:
    size = sum(copies[name] for name in names)
    return {"FP8 copies": size} if size else {}


def engine_memory(
    rollout: RolloutConfig,
    shape: ModelShape,
    gpu: Gpu,
    dtype: str,
    offload: bool,
) -> dict[str, int]:
    """Return vLLM's memory while it generates: its share of the GPU holds weights, work, captured graphs and the cache.

    The work is that of a full batch of text and, on top, what vLLM tries out when it starts: the vision tower on as
    many images as a batch has room for, and their features.
    """
    dtype_bytes = DTYPE_BYTES[dtype]
    tp = rollout.tp
    hidden = shape.hidden
    counts = count_parameters(shape)
    weights = sum(counts.values()) * dtype_bytes // tp

    # The merger makes one token of `merge**2` patches.
    vision = shape.vision
    patches = _ENGINE_BATCH * vision.merge**2
    inner_matrices = 2 if vision.has_gate else 1
    patch_elements = _TOWER_ROWS * vision.hidden + inner_matrices * vision.ffn // tp
    images = patches * patch_elements * dtype_bytes
    images += (1 + vision.layer_features) * _ENGINE_BATCH * hidden * dtype_bytes

    token_elements = 2 * shape.ffn // tp + 4 * hidden
    batch = _ENGINE_BATCH * token_elements * dtype_bytes
    batch += 3 * rollout.max_num_seqs * shape.vocab * 4  # float32 logits and what sampling copies of them
    work = max(batch, images)

    graphs = _graphs(rollout)
    if rollout.kv_cache_gib:
        cache = int(rollout.kv_cache_gib * _GIB)
    else:
        budget = int(rollout.memory_share(offload) * gpu.memory)
        cache = budget - weights - work
        cache -= CONTEXT + sum(graphs.values())
    memory = {
        "vLLM weights": weights,
        "vLLM cache": cache,
        "vLLM at work": work,
    }
    return memory | graphs


def cache_shortage(scenario: Scenario) -> str:
    """Return why the engines' cache cannot hold one sequence of the longest kind, without which vLLM does not start.

    Empty where it can.
    """
    config = scenario.config
    if not isinstance(config, RLConfig) or not config.generates:
        return ""
    rollout = config.rollout
    dtype = config.model.dtype
    engine = engine_memory(rollout, scenario.shape, scenario.gpu, dtype, config.offload)
    tokens = max(0, engine["vLLM cache"] // cache_bytes_per_token(scenario.shape, rollout, dtype))
    if tokens >= config.longest_sequence:
        return ""
    return f"no room for vLLM's cache: it holds {tokens:,} tokens, a sequence has {config.longest_sequence:,}"


def _graphs(rollout: RolloutConfig) -> dict[str, int]:
    return {} if rollout.enforce_eager else {"vLLM graphs": GRAPHS}


def cache_bytes_per_token(shape: ModelShape, rollout: RolloutConfig, dtype: str) -> int:
    """Return the bytes of a token's keys and values on one rank of the engine."""
    # With more ranks than heads each rank has a copy of one.
    heads = max(shape.kv_heads // rollout.tp, 1)
    elements = 2 * shape.layers * heads * shape.head_dim
    return elements * DTYPE_BYTES[dtype]


def checkpoint_bytes(
    config: ColdStartConfig | RLConfig,
    shape: ModelShape,
    critic_shape: ModelShape | None = None,
) -> int:
    """Return the bytes of one checkpoint on disk: weights, moments and master weights of every model of the recipe.

    Args:
        config: the recipe.
        shape: the model's sizes.
        critic_shape: those of the critic; None: the same.
    """
    model = config.model
    models = []
    if not isinstance(config, RLConfig) or config.trains_policy:
        models.append((shape, False))
    if isinstance(config, RLConfig) and config.algorithm.has_critic:
        models.append((critic_shape or shape, True))
    weight_bytes = DTYPE_BYTES[model.dtype]
    adam_bytes = MOMENT_BYTES + MASTER_BYTES[model.dtype]
    # A folder has every tensor once, whatever the layout: so has a single rank.
    single_rank = ParallelConfig()
    size = 0
    for model_shape, critic in models:
        state = model_state(model_shape, model, single_rank, 1, critic=critic)
        # Of a model with adapters only those are saved.
        saved = state.trained if model.lora.rank else state.parameters
        size += saved * weight_bytes
        size += state.trained * adam_bytes
    return size


def room_for_patches(scenario: Scenario) -> int | None:
    """Return the patches that a pack may bring before the fullest phase passes the GPU's memory.

    None: the vision tower stores nothing, so that any number of patches fits.
    """
    # With many patches memory grows linearly: the line goes through the peaks at a million and half a million.
    million = 1 << 20
    half = million // 2
    peak = _peak_with_patches(scenario, million)
    if _peak_with_patches(scenario, 0) == peak:
        return None
    growth = peak - _peak_with_patches(scenario, half)
    bytes_per_patch = growth / half
    free_bytes = scenario.gpu.memory - peak
    further_patches = math.floor(free_bytes / bytes_per_patch)
    return max(0, million + further_patches)


def _peak_with_patches(scenario: Scenario, patches: int) -> int:
    """Return the bytes of the fullest phase with so many ``patches`` in every pack."""
    pack_tokens = scenario.config.data.pack_tokens
    spans = []
    for span in scenario.spans:
        load = span.load
        sample_patches = patches * load.tokens / pack_tokens
        patch_load = replace(load, patches=sample_patches)
        spans.append(replace(span, load=patch_load))
    patch_scenario = replace(scenario, spans=tuple(spans))
    return fullest_phase(phases(patch_scenario)).total
