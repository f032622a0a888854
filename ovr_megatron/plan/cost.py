"""Seconds of a step by a simple model; it ranks layouts, and says where the time goes.

matrix work   FLOP with recomputation / (GPUs x peak x `EFFICIENCY`)
elementwise   passes over the residual stream and the MLP / memory bandwidth
tensor, context and pipeline traffic    bytes / (`WIRE` x the slower of the links that it crosses)
bubble        (pp - 1) / (vpp x micro-batches) of the above
data traffic  gradients (4 B) and gathered weights, once a step; with overlap what the last backward pass hides is free
optimizer     its parameters and state read and written / memory bandwidth
sync          an engine's weights written once / memory bandwidth, what its rank lacks / (`WIRE` x link)
"""

from __future__ import annotations

from dataclasses import dataclass

from ovr_megatron.config import ColdStartConfig, RLConfig
from ovr_megatron.plan.flops import TokenFlops, token_flops
from ovr_megatron.plan.hardware import Gpu
from ovr_megatron.plan.memory import cache_bytes_per_token, engine_memory
from ovr_megatron.plan.parameters import DTYPE_BYTES, GRADIENT_BYTES, count_parameters, model_state
from ovr_megatron.plan.scenario import Scenario, Span

EFFICIENCY = 0.6  # of the peak rate, reached by large matrix products and attention alone
WIRE = 0.7  # of a link's rate, reached by large collectives
_STREAM_PASSES = 20  # reads and writes of [S, D] in a layer, forward and backward
_FFN_PASSES = 8  # the same of [T, F]
_OPTIMIZER_PASS = 32  # bytes read and written for each parameter that Adam updates
_DECODE_OVERHEAD = 0.008  # seconds of a decoding step beside its memory traffic


@dataclass(frozen=True)
class Seconds:
    """Seconds of one step or iteration by what they go to."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Return the seconds of all parts."""
        return sum(self.parts.values())


def model_flops(scenario: Scenario, span: Span) -> float:
    """Return the FLOP of one step or iteration without recomputation; in RL generation counts its forward pass."""
    config = scenario.config
    tokens = scenario.tokens(span)
    policy = token_flops(scenario.shape, config.model, span.load)
    if isinstance(config, ColdStartConfig):
        return tokens * policy.training
    algorithm = config.algorithm
    forward_passes = 1 + algorithm.scoring_passes
    per_token = policy.forward * forward_passes + policy.training * algorithm.policy_epochs
    if algorithm.has_critic:
        critic = token_flops(scenario.shape, config.model, span.load, critic=True)
        per_token += critic.forward + critic.training
    return tokens * per_token


def seconds(scenario: Scenario, span: Span) -> Seconds:
    """Return the seconds of one step or iteration of ``span``."""
    config = scenario.config
    policy = token_flops(scenario.shape, config.model, span.load)
    if isinstance(config, ColdStartConfig):
        return Seconds(_training(scenario, span, policy, 1, False))
    algorithm = config.algorithm
    parts = {"generate": generation_seconds(scenario, span)}
    if algorithm.scoring_passes:
        scoring = _training(scenario, span, _forward_only(policy), 1, False, backward=False)
        parts["log-probabilities"] = sum(scoring.values()) * algorithm.scoring_passes
    if algorithm.has_critic:
        critic_scenario = scenario.critic_scenario
        critic = token_flops(scenario.shape, config.model, span.load, critic=True)
        values = _training(critic_scenario, span, _forward_only(critic), 1, True, backward=False)
        update = _training(critic_scenario, span, critic, algorithm.critic_steps, True)
        parts["value"] = sum(values.values())
        parts["update critic"] = sum(update.values())
    epoch = _training(scenario, span, policy, algorithm.policy_steps, False)
    parts["update policy"] = sum(epoch.values()) * algorithm.policy_epochs
    return Seconds(parts | {"sync": _sync_seconds(scenario)})


def _forward_only(flops: TokenFlops) -> TokenFlops:
    """Return the FLOP of a pass without gradients in the place of those of training."""
    return TokenFlops(0, flops.forward, 0)


def _sync_seconds(scenario: Scenario) -> float:
    """Return the seconds to write an engine's share of the weights once and to receive what its rank lacks of it."""
    config = scenario.config
    gpu = scenario.gpu
    assert isinstance(config, RLConfig)
    parallel = config.parallel
    weight_bytes = sum(count_parameters(scenario.shape).values()) * DTYPE_BYTES[config.model.dtype]
    engine_share = weight_bytes / config.rollout.tp
    received = engine_share * (1 - 1 / (parallel.tp * parallel.pp))
    # Stages are the outermost dimension of the ranks, so with a pipeline shards come from all over the world.
    ranks_apart = parallel.tp if parallel.pp == 1 else scenario.world
    copying = 2 * engine_share / gpu.bandwidth
    receiving = received / _link_rate(gpu, ranks_apart)
    return copying + receiving


def bubble(scenario: Scenario, span: Span, share: int = 1) -> float:
    """Return the idle share that the pipeline adds to a step's work."""
    parallel = scenario.config.parallel
    slots = parallel.vpp * scenario.micro_batches(span, share)
    return (parallel.pp - 1) / slots


def _training(
    scenario: Scenario, span: Span, flops: TokenFlops, steps: int, critic: bool, backward: bool = True
) -> dict[str, float]:
    """Return the seconds of passes over all tokens of an iteration, in ``steps`` optimizer steps.

    Without ``backward`` there is no optimizer step: ``steps`` only cuts the tokens into packs.
    """
    gpu = scenario.gpu
    config = scenario.config
    parallel = config.parallel
    packs = scenario.micro_batches(span, steps) * steps
    tokens = scenario.tokens(span) / scenario.dp
    recomputed = flops.recomputed if backward else 0.0
    replica_rate = parallel.ranks * gpu.flops * EFFICIENCY
    work = tokens * (flops.training + recomputed) / replica_rate
    parts = {"matrix work": work}
    # A backward pass counts as two; full recomputation adds a forward pass.
    passes = 1
    if backward:
        passes = 4 if config.model.recompute == "full" else 3
    parts |= _replica_traffic(scenario, tokens, passes)
    idle = bubble(scenario, span, steps) * sum(parts.values())
    if parallel.pp > 1:
        parts["bubble"] = idle
    if backward:
        # Gradients are reduced behind the last pack's backward pass, two thirds of its time.
        last_backward = (sum(parts.values()) - idle) / packs * 2 / 3
        traffic, optimizer = _optimizer_step(scenario, critic)
        exposed = max(0.0, traffic - last_backward) if parallel.overlap else traffic
        parts |= {"data-parallel traffic": exposed * steps, "optimizer": optimizer * steps}
    return parts


def _replica_traffic(scenario: Scenario, tokens: float, passes: int) -> dict[str, float]:
    """Return the seconds of elementwise work and of traffic within a replica, for ``tokens`` on each replica."""
    shape = scenario.shape
    gpu = scenario.gpu
    parallel = scenario.config.parallel
    dtype_bytes = DTYPE_BYTES[scenario.config.model.dtype]
    rows = tokens / parallel.cp
    layers = shape.layers / parallel.pp
    sp_rows = rows / parallel.tp if parallel.sequence_parallel else rows
    stream_bytes = sp_rows * shape.hidden * dtype_bytes
    ffn_bytes = rows * shape.ffn / parallel.tp * dtype_bytes
    # `_STREAM_PASSES` and `_FFN_PASSES` count those of a forward and a backward pass: three.
    share_of_passes = passes / 3
    layer_bytes = _STREAM_PASSES * stream_bytes + _FFN_PASSES * ffn_bytes
    parts = {"elementwise": share_of_passes * layers * layer_bytes / gpu.bandwidth}
    if parallel.tp > 1:
        # Two all-reduces, or their two halves, a layer and pass; sequence parallelism gathers twice more going back.
        reductions = 2 * (passes - 1 if passes > 1 else 1)
        volume = reductions * 2 * rows * shape.hidden * dtype_bytes * (parallel.tp - 1) / parallel.tp
        if parallel.sequence_parallel and passes > 1:
            volume *= 1.25
        parts["tensor-parallel traffic"] = layers * volume / _link_rate(gpu, parallel.tp)
    if parallel.cp > 1:
        key_value_bytes = 2 * shape.kv_heads * shape.head_dim / parallel.tp * dtype_bytes
        volume = rows * (parallel.cp - 1) * key_value_bytes * passes
        ranks_apart = parallel.tp * parallel.cp
        # Half of it is taken to hide behind attention.
        parts["context-parallel traffic"] = 0.5 * layers * volume / _link_rate(gpu, ranks_apart)
    if parallel.pp > 1:
        directions = 2 if passes > 1 else 1
        volume = sp_rows * shape.hidden * dtype_bytes * parallel.vpp * directions
        ranks_apart = parallel.tp * parallel.cp * parallel.pp
        parts["pipeline traffic"] = volume / _link_rate(gpu, ranks_apart)
    return parts


def _link_rate(gpu: Gpu, ranks_apart: int) -> float:
    """Return the bytes a second between ranks that lie within ``ranks_apart`` neighbouring ones."""
    return WIRE * (gpu.link if ranks_apart <= gpu.per_node else gpu.network)


def _optimizer_step(scenario: Scenario, critic: bool) -> tuple[float, float]:
    """Return the seconds of the data-parallel traffic and of Adam in one optimizer step of the first stage."""
    config = scenario.config
    parallel = config.parallel
    gpu = scenario.gpu
    ranks = scenario.dp * parallel.cp
    state = model_state(scenario.shape, config.model, parallel, scenario.dp, critic=critic)
    # Reduce-scatter of gradients and all-gather of weights, or both halves of an all-reduce of gradients.
    gathered = DTYPE_BYTES[config.model.dtype] if parallel.distributed_optimizer else GRADIENT_BYTES
    volume = state.trained * (GRADIENT_BYTES + gathered) * (ranks - 1) / ranks
    owned = state.trained / ranks if parallel.distributed_optimizer else state.trained
    traffic = volume / _link_rate(gpu, scenario.world)
    update = owned * _OPTIMIZER_PASS / gpu.bandwidth
    return traffic, update


def generation_seconds(scenario: Scenario, span: Span) -> float:
    """Return the seconds to generate an iteration's responses: each decoding step reads the weights and the cache.

    Engines run as many sequences at once as their cache has room for; at the end the longest run on alone.
    """
    config = scenario.config
    gpu = scenario.gpu
    assert isinstance(config, RLConfig)
    engine = engine_memory(config.rollout, scenario.shape, gpu, config.model.dtype, config.offload)
    token_bytes = cache_bytes_per_token(scenario.shape, config.rollout, config.model.dtype)
    mean_tokens = span.load.tokens
    requests = config.prompts * config.responses * config.rollout.tp / scenario.world
    cached_sequences = engine["vLLM cache"] / token_bytes / mean_tokens
    running = max(1.0, min(config.rollout.max_num_seqs, requests, cached_sequences))
    weight_bytes = engine["vLLM weights"]
    # On average a running sequence has half of its cache.
    read_bytes = weight_bytes + running * token_bytes * mean_tokens / 2
    step_seconds = read_bytes / gpu.bandwidth + _DECODE_OVERHEAD
    steady = requests / running * mean_tokens * step_seconds
    last_step_seconds = weight_bytes / gpu.bandwidth + _DECODE_OVERHEAD
    tail = (span.limit - mean_tokens) * last_step_seconds
    policy = token_flops(scenario.shape, config.model, span.load)
    prefill_flops = requests * mean_tokens * policy.forward
    engine_rate = config.rollout.tp * gpu.flops * EFFICIENCY
    return steady + tail + prefill_flops / engine_rate
