"""Memory of the fullest rank in every phase of a recipe, item by item in bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from ovr_megatron.config import ColdStartConfig, ModelConfig, ParallelConfig, RLConfig, RolloutConfig
from ovr_megatron.model.shape import ModelShape
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
from ovr_megatron.plan.setting import Setting, Span

_GIB = 1 << 30
CONTEXT = int(1.5 * _GIB)  # CUDA context, libraries' kernels and workspaces
GROUP = _GIB // 4  # NCCL's buffers for each process group of more than one rank
MARGIN = 0.05  # of the GPU's memory, for fragmentation
GRAPHS = _GIB  # vLLM's captured graphs, which stay while it sleeps unless models are offloaded
_ENGINE_BATCH = 16384  # tokens that vLLM works on at once
_TOWER_ROWS = 6  # rows of the tower's width that a patch has at once in one of its layers, beside the MLP's two


@dataclass(frozen=True)
class Phase:
    """What the fullest rank holds in one phase."""

    name: str
    stage: int
    items: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.items.values())


def phases(setting: Setting) -> list[Phase]:
    """Every phase, each on the pipeline stage that needs most in it."""
    per_stage = [_of_stage(setting, stage) for stage in _stages(setting.config.parallel)]
    return [max(together, key=lambda phase: phase.total) for together in zip(*per_stage, strict=True)]


def _stages(parallel: ParallelConfig) -> list[int]:
    """Stages that can be the fullest: the first two and the last."""
    return sorted({0, min(1, parallel.pp - 1), parallel.pp - 1})


def _of_stage(setting: Setting, stage: int) -> list[Phase]:
    config, shape = setting.config, setting.shape
    always = _always(setting)
    state = _state(shape, config.model, config.parallel, setting.dp, stage, False)
    if isinstance(config, ColdStartConfig):
        train = _training(setting, stage, False, 1)
        whole = 2 * shape.vocab * shape.hidden  # the largest tensor is put together from its shards
        save = {**_model("", state), "whole tensors": whole * 4}
        found = {"train": train, "save": save}
    else:
        found = _of_iteration(setting, stage, state)
    return [Phase(name, stage, {**items, **always}) for name, items in found.items()]


def _of_iteration(setting: Setting, stage: int, state: ModelState) -> dict[str, dict[str, int]]:
    """The phases of PPO and its relatives; ``state`` is the policy's."""
    config, shape = setting.config, setting.shape
    assert isinstance(config, RLConfig)
    algorithm = config.algorithm
    models = {"policy": state}
    if algorithm.has_critic:
        critic = setting.of_critic
        layout = critic.config.parallel
        at = stage if layout.pp == config.parallel.pp else 0  # of another pipeline the first, which has the tower
        models["critic"] = _state(shape, config.model, layout, critic.dp, at, True)

    copies = {"policy": fp8_bytes(shape, config.model, config.parallel, stage, False)}
    copies["reference"] = copies["policy"]
    if algorithm.has_critic:
        copies["critic"] = fp8_bytes(shape, config.model, layout, at, True)

    def held(*working: str, trains: bool = False) -> dict[str, int]:
        """What the models have on the GPU while those of ``working`` have something to do."""
        if not config.offload:
            found = {name: model.total for name, model in models.items()}
            found |= {"reference": state.weights} if algorithm.kl_coefficient else {}
            return found | _eight_bit(copies, tuple(found))
        there = models | ({"reference": state} if algorithm.kl_coefficient else {})
        found = {name: there[name].total if trains else there[name].weights for name in working}
        return found | _eight_bit(copies, working)

    engine = engine_memory(config.rollout, shape, setting.gpu, config.model.dtype, config.offload)
    asleep = {} if config.offload else _graphs(config.rollout)
    found = {"generate": held() | engine}
    if algorithm.has_critic:
        values = max((_activations(critic, span, at, True, 1) for span in setting.spans), key=lambda a: a.forward)
        found["value"] = held("critic") | {"activations": values.forward} | asleep
        found["update critic"] = held("critic", trains=True) | _work(critic, at, True, algorithm.critic_steps) | asleep
    if algorithm.scoring_passes:
        scores = max((_activations(setting, span, stage, False, 1) for span in setting.spans), key=lambda a: a.forward)
        found["log-probabilities"] = held("policy") | {"activations": scores.forward} | asleep
    work = _work(setting, stage, False, algorithm.policy_steps)
    found["update policy"] = held("policy", trains=True) | work | asleep
    parts = config.parallel.tp * config.parallel.pp
    buckets = int(2 * config.rollout.bucket_mib * 2**20) if parts > 1 else 0
    weights = {"vLLM weights": engine["vLLM weights"]}
    # What wakes vLLM's weights wakes its graphs, too.
    found["sync"] = held("policy") | weights | _graphs(config.rollout) | {"buckets": buckets}
    return found


def _always(setting: Setting) -> dict[str, int]:
    parallel = setting.config.parallel
    sizes = (parallel.tp, parallel.pp, parallel.cp, setting.dp, setting.dp * parallel.cp, setting.world)
    groups = sum(size > 1 for size in sizes)
    if isinstance(setting.config, RLConfig):
        groups += setting.config.rollout.tp > 1
    margin = int(MARGIN * setting.gpu.memory)
    return {"CUDA context": CONTEXT, "NCCL buffers": groups * GROUP, "fragmentation margin": margin}


@lru_cache(maxsize=512)
def _cached_state(
    shape: ModelShape, model: ModelConfig, parallel: ParallelConfig, dp: int, stage: int, critic: bool
) -> ModelState:
    return model_state(shape, model, parallel, dp, stage, critic=critic)


def _state(
    shape: ModelShape, model: ModelConfig, parallel: ParallelConfig, dp: int, stage: int, critic: bool
) -> ModelState:
    return _cached_state(shape, replace(model, recompute="none"), parallel, dp, stage, critic)


def _model(prefix: str, state: ModelState) -> dict[str, int]:
    parts = {"weights": state.weights, "gradients": state.gradients, "optimizer": state.optimizer}
    return {f"{prefix}{name}": size for name, size in parts.items()}


def _activations(setting: Setting, span: Span, stage: int, critic: bool, share: int) -> Activations:
    config = setting.config
    packs = setting.micro_batches(span, share)
    return activations(setting.shape, config.model, config.parallel, setting.pack(span), packs, stage, critic)


def _work(setting: Setting, stage: int, critic: bool, share: int) -> dict[str, int]:
    found = [_activations(setting, span, stage, critic, share) for span in setting.spans]
    most = max(found, key=lambda a: a.peak)
    return {
        "activations kept": most.saved - most.vision,
        "vision kept": most.vision,
        "layer or head at work": most.working,
    }


def _training(setting: Setting, stage: int, critic: bool, share: int) -> dict[str, int]:
    config = setting.config
    state = _state(setting.shape, config.model, config.parallel, setting.dp, stage, critic)
    copies = {"model": fp8_bytes(setting.shape, config.model, config.parallel, stage, critic)}
    return _model("", state) | _eight_bit(copies, ("model",)) | _work(setting, stage, critic, share)


def fp8_bytes(shape: ModelShape, model: ModelConfig, parallel: ParallelConfig, stage: int, critic: bool) -> int:
    """Bytes of the 8-bit copies of the layers' matrices that Transformer Engine keeps from the first pass on.

    Two of each on Hopper, row by row and transposed (`_fp8_workspaces` of its modules); their scales are not counted.
    """
    if model.fp8 == "none":
        return 0
    parts = rank_parameters(shape, model, parallel, critic, stage)
    decoder = [p for part in parts for p in part if p.name.startswith("decoder.layers.")]
    matrices = [p.numbers for p in decoder if p.name.endswith(".weight")]
    left = 1 - 2 * model.fp8_bf16_layers / shape.layers if parallel.pp == 1 else 1  # which stage has them is not asked
    return int(2 * sum(matrices) * left)


def _eight_bit(copies: dict[str, int], names: Sequence[str]) -> dict[str, int]:
    size = sum(copies[name] for name in names)
    return {"FP8 copies": size} if size else {}


def engine_memory(rollout: RolloutConfig, shape: ModelShape, gpu: Gpu, dtype: str, offload: bool) -> dict[str, int]:
    """VLLM's memory while it generates: its share of the GPU holds weights, work, captured graphs and the cache.

    The work is that of a full batch of text and, on top, what vLLM tries out when it starts: the vision tower on as
    many images as a batch has room for, and their features.
    """
    number = DTYPE_BYTES[dtype]
    vision = shape.vision
    patches = _ENGINE_BATCH * vision.merge**2
    images = patches * (_TOWER_ROWS * vision.hidden + 2 * vision.ffn // rollout.tp) * number
    images += _ENGINE_BATCH * shape.hidden * number
    weights = sum(count_parameters(shape).values()) * number // rollout.tp
    batch = _ENGINE_BATCH * (2 * shape.ffn // rollout.tp + 4 * shape.hidden) * number
    batch += 3 * rollout.max_num_seqs * shape.vocab * 4
    graphs = _graphs(rollout)
    if rollout.kv_cache_gib:
        cache = int(rollout.kv_cache_gib * _GIB)
    else:
        share = int(rollout.memory_share(offload) * gpu.memory)
        cache = share - weights - max(batch, images) - CONTEXT - sum(graphs.values())
    return {"vLLM weights": weights, "vLLM cache": cache, "vLLM at work": max(batch, images)} | graphs


def _graphs(rollout: RolloutConfig) -> dict[str, int]:
    return {} if rollout.enforce_eager else {"vLLM graphs": GRAPHS}


def cache_bytes_per_token(shape: ModelShape, rollout: RolloutConfig, dtype: str) -> int:
    """Keys and values of a token on one rank of the engine."""
    heads = max(shape.kv_heads // rollout.tp, 1)
    return 2 * shape.layers * heads * shape.head_dim * DTYPE_BYTES[dtype]


def checkpoint_bytes(setting: Setting) -> int:
    """Tensors of one checkpoint on disk: weights, moments and master weights of every model of the recipe."""
    model = setting.config.model
    kinds = (False, True) if isinstance(setting.config, RLConfig) else (False,)
    one = ParallelConfig()
    states = [model_state(setting.shape, model, one, 1, critic=critic) for critic in kinds]
    adam = MOMENT_BYTES + MASTER_BYTES[model.dtype]
    return sum(s.parameters * DTYPE_BYTES[model.dtype] + s.trained * adam for s in states)


def room_for_patches(setting: Setting) -> int | None:
    """Patches that a pack may bring before the fullest phase passes the GPU's memory; None: the tower keeps nothing."""
    with_few, with_many = (_with_patches(setting, count) for count in (0, 1 << 20))
    if with_few == with_many:
        return None
    rate = (with_many - _with_patches(setting, 1 << 19)) / (1 << 19)
    return max(0, math.floor((setting.gpu.memory - with_many) / rate) + (1 << 20))


def _with_patches(setting: Setting, patches: int) -> int:
    tokens = setting.config.data.pack_tokens
    spans = tuple(
        replace(span, load=replace(span.load, patches=patches * span.load.tokens / tokens)) for span in setting.spans
    )
    return max(phase.total for phase in phases(replace(setting, spans=spans)))
