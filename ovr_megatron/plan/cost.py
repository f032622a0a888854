"""Seconds of a step by a simple model; it ranks layouts, and says where the time goes.

matrix work   FLOP with recomputation / (GPUs x peak x `EFFICIENCY`)
elementwise   passes over the residual stream and the perceptron / memory bandwidth
tensor, context and pipeline traffic    bytes / (`WIRE` x the slower of the links that it crosses)
bubble        (pp - 1) / (vpp x micro-batches) of the above
data traffic  gradients (4 B) and gathered weights, once a step; with overlap what the last backward pass hides is free
optimizer     its numbers read and written / memory bandwidth
sync          an engine's weights written once / memory bandwidth, what its rank lacks / (`WIRE` x link)
"""

from __future__ import annotations

from dataclasses import dataclass

from ovr_megatron.config import ColdStartConfig, RLConfig
from ovr_megatron.plan.flops import TokenFlops, token_flops
from ovr_megatron.plan.hardware import Gpu
from ovr_megatron.plan.memory import cache_bytes_per_token, engine_memory
from ovr_megatron.plan.parameters import DTYPE_BYTES, count_parameters, model_state
from ovr_megatron.plan.setting import Setting, Span

EFFICIENCY = 0.6  # of the peak rate, reached by large matrix products and attention alone
WIRE = 0.7  # of a link's rate, reached by large collectives
_STREAM_PASSES, _FFN_PASSES = 20, 8  # reads and writes of [S, D] and [T, F] in a layer, forward and backward
_OPTIMIZER_PASS = 32  # bytes read and written for each number that Adam steps
_DECODE_OVERHEAD = 0.008  # seconds of a decoding step beside its memory traffic


@dataclass(frozen=True)
class Seconds:
    """Seconds of one step or iteration by what they go to."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Seconds."""
        return sum(self.parts.values())


def model_flops(setting: Setting, span: Span) -> float:
    """FLOP of one step or iteration, recomputation not counted; in RL generation counts its forward pass."""
    config, tokens = setting.config, setting.tokens(span)
    policy = token_flops(setting.shape, config.model, span.load)
    if isinstance(config, ColdStartConfig):
        return tokens * policy.training
    algorithm = config.algorithm
    work = policy.forward * (1 + algorithm.scoring_passes) + policy.training * algorithm.policy_epochs
    if algorithm.has_critic:
        critic = token_flops(setting.shape, config.model, span.load, critic=True)
        work += critic.forward + critic.training
    return tokens * work


def seconds(setting: Setting, span: Span) -> Seconds:
    """Seconds of one step or iteration of ``span``."""
    config = setting.config
    if isinstance(config, ColdStartConfig):
        return Seconds(_training(setting, span, token_flops(setting.shape, config.model, span.load), 1, False))
    algorithm = config.algorithm
    flops = [token_flops(setting.shape, config.model, span.load, critic) for critic in (False, True)]
    forward = [TokenFlops(0, found.forward, 0) for found in flops]
    epoch = _training(setting, span, flops[0], algorithm.policy_steps, False)
    parts = {"generate": generation_seconds(setting, span)}
    if algorithm.scoring_passes:
        score = _training(setting, span, forward[0], 1, False, backward=False)
        parts["log-probabilities"] = sum(score.values()) * algorithm.scoring_passes
    if algorithm.has_critic:
        critic = setting.of_critic
        parts["value"] = sum(_training(critic, span, forward[1], 1, True, backward=False).values())
        parts["update critic"] = sum(_training(critic, span, flops[1], algorithm.critic_steps, True).values())
    parts["update policy"] = sum(epoch.values()) * algorithm.policy_epochs
    return Seconds(parts | {"sync": _sync_seconds(setting)})


def _sync_seconds(setting: Setting) -> float:
    """An engine's share of the weights written once, and what its rank lacks of it received."""
    config, gpu = setting.config, setting.gpu
    assert isinstance(config, RLConfig)
    parallel = config.parallel
    share = sum(count_parameters(setting.shape).values()) * DTYPE_BYTES[config.model.dtype] / config.rollout.tp
    others = share * (1 - 1 / (parallel.tp * parallel.pp))
    span = parallel.tp if parallel.pp == 1 else setting.world  # stages are the outermost dimension of the ranks
    return 2 * share / gpu.bandwidth + others / _rate(gpu, span)


def bubble(setting: Setting, span: Span, share: int = 1) -> float:
    """Idle share that the pipeline adds to a step's work."""
    parallel = setting.config.parallel
    return (parallel.pp - 1) / (parallel.vpp * setting.micro_batches(span, share))


def _training(
    setting: Setting, span: Span, flops: TokenFlops, steps: int, critic: bool, backward: bool = True
) -> dict[str, float]:
    """Seconds of passes over all tokens of an iteration, in ``steps`` optimizer steps (none without ``backward``)."""
    gpu, parallel = setting.gpu, setting.config.parallel
    packs = setting.micro_batches(span, steps) * steps
    tokens = setting.tokens(span) / setting.dp
    again = flops.again if backward else 0.0
    work = tokens * (flops.training + again) / (parallel.ranks * gpu.flops * EFFICIENCY)
    parts = {"matrix work": work}
    passes = (3 if backward else 1) + (1 if backward and setting.config.model.recompute == "full" else 0)
    parts |= _traffic(setting, tokens, passes)
    idle = bubble(setting, span, steps) * sum(parts.values())
    if parallel.pp > 1:
        parts["bubble"] = idle
    if backward:
        last = (sum(parts.values()) - idle) / packs * 2 / 3
        data, optimizer = _step(setting, critic)
        exposed = max(0.0, data - last) if parallel.overlap else data
        parts |= {"data-parallel traffic": exposed * steps, "optimizer": optimizer * steps}
    return parts


def _traffic(setting: Setting, tokens: float, passes: int) -> dict[str, float]:
    """Seconds of elementwise work and of traffic within a replica, for ``tokens`` on each replica."""
    shape, gpu, parallel = setting.shape, setting.gpu, setting.config.parallel
    number = DTYPE_BYTES[setting.config.model.dtype]
    rows, layers = tokens / parallel.cp, shape.layers / parallel.pp
    thin = rows / parallel.tp if parallel.sequence_parallel else rows
    stream, wide = thin * shape.hidden * number, rows * shape.ffn / parallel.tp * number
    share = passes / 3
    parts = {"elementwise": share * layers * (_STREAM_PASSES * stream + _FFN_PASSES * wide) / gpu.bandwidth}
    if parallel.tp > 1:
        # Two all-reduces, or their two halves, a layer and pass; sequence parallelism gathers twice more going back.
        reductions = 2 * (passes - 1 if passes > 1 else 1)
        volume = reductions * 2 * rows * shape.hidden * number * (parallel.tp - 1) / parallel.tp
        if parallel.sequence_parallel and passes > 1:
            volume *= 1.25
        parts["tensor-parallel traffic"] = layers * volume / _rate(gpu, parallel.tp)
    if parallel.cp > 1:
        keys = 2 * shape.kv_heads * shape.head_dim / parallel.tp * number
        volume = rows * (parallel.cp - 1) * keys * passes
        parts["context-parallel traffic"] = 0.5 * layers * volume / _rate(gpu, parallel.tp * parallel.cp)
    if parallel.pp > 1:
        volume = thin * shape.hidden * number * parallel.vpp * (2 if passes > 1 else 1)
        parts["pipeline traffic"] = volume / _rate(gpu, parallel.tp * parallel.cp * parallel.pp)
    return parts


def _rate(gpu: Gpu, span: int) -> float:
    """Bytes a second between ranks that lie within ``span`` neighbouring ones."""
    return WIRE * (gpu.link if span <= gpu.per_node else gpu.network)


def _step(setting: Setting, critic: bool) -> tuple[float, float]:
    """Seconds of the data-parallel traffic and of Adam in one optimizer step of the first stage."""
    config, gpu, ranks = setting.config, setting.gpu, setting.dp * setting.config.parallel.cp
    state = model_state(setting.shape, config.model, config.parallel, setting.dp, critic=critic)
    gathered = DTYPE_BYTES[config.model.dtype] if config.parallel.distributed_optimizer else 4
    volume = state.trained * (4 + gathered) * (ranks - 1) / ranks
    owned = state.trained / ranks if config.parallel.distributed_optimizer else state.trained
    return volume / _rate(gpu, setting.world), owned * _OPTIMIZER_PASS / gpu.bandwidth


def generation_seconds(setting: Setting, span: Span) -> float:
    """Seconds to generate an iteration's responses: decoding reads the weights and the cache at every step.

    Engines hold as many sequences at once as their cache has room for; at the end the longest run on alone.
    """
    config, gpu = setting.config, setting.gpu
    assert isinstance(config, RLConfig)
    engine = engine_memory(config.rollout, setting.shape, gpu, config.model.dtype, config.offload)
    each = cache_bytes_per_token(setting.shape, config.rollout, config.model.dtype)
    mean = span.load.tokens
    requests = config.prompts * config.responses * config.rollout.tp / setting.world
    at_once = max(1.0, min(config.rollout.max_num_seqs, requests, engine["vLLM cache"] / each / mean))
    reading = (engine["vLLM weights"] + at_once * each * mean / 2) / gpu.bandwidth
    steady = requests / at_once * mean * (reading + _DECODE_OVERHEAD)
    tail = (span.limit - mean) * (engine["vLLM weights"] / gpu.bandwidth + _DECODE_OVERHEAD)
    prefill = requests * mean * token_flops(setting.shape, config.model, span.load).forward
    return steady + tail + prefill / (config.rollout.tp * gpu.flops * EFFICIENCY)
