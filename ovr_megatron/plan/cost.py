"""Seconds of a step by a simple model; it ranks layouts, and says where the time goes.

matrix work   FLOP with recomputation / (GPUs x peak x `EFFICIENCY`)
elementwise   passes over the residual stream and the MLP / memory bandwidth
tensor, context and pipeline traffic    bytes / (`WIRE` x the slower of the links that it crosses)
bubble        (pp - 1) / (vpp x micro-batches) of the above
data traffic  gradients (4 B) and gathered weights, once a step; with overlap what the last backward pass hides is free
optimizer     its parameters and state read and written / memory bandwidth
sync          an engine's weights written once / memory bandwidth, what its rank lacks / (`WIRE` x link)
offload       weights and optimizer state of every model to the host and back, once an iteration / (`WIRE` x PCIe)
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
DECODE_OVERHEAD = 0.008  # seconds of a decoding step beside its memory traffic


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
    shape = scenario.shape
    load = span.load
    tokens = scenario.tokens(span)
    policy = token_flops(shape, scenario.model, load)
    if isinstance(config, ColdStartConfig):
        return tokens * policy.training
    algorithm = config.algorithm
    # Generation computes each token once, as a forward pass does.
    forward_passes = config.generates + config.scoring_passes
    per_token = policy.forward * forward_passes
    if config.trains_policy:
        per_token += policy.training * algorithm.policy_epochs
    if algorithm.has_critic:
        critic = token_flops(scenario.critic_scenario.shape, config.model, load, critic=True)
        per_token += critic.forward + critic.training
    teacher = scenario.teacher_scenario
    if teacher:
        per_token += token_flops(teacher.shape, teacher.model, load).forward
    return tokens * per_token


def seconds(scenario: Scenario, span: Span) -> Seconds:
    """Return the seconds of one step or iteration of ``span``."""
    config = scenario.config
    shape = scenario.shape
    policy = token_flops(shape, scenario.model, span.load)
    if isinstance(config, ColdStartConfig):
        parts = _training(scenario, span, policy, 1, False)
        return Seconds(parts)
    algorithm = config.algorithm
    parts = {}
    if config.generates:
        parts["generate"] = generation_seconds(scenario, span)
    if config.scoring_passes:
        scoring_flops = _forward_only(policy)
        scoring = _training(scenario, span, scoring_flops, 1, False, backward=False)
        parts["log-probabilities"] = sum(scoring.values()) * config.scoring_passes
    teacher = scenario.teacher_scenario
    if teacher:
        teacher_flops = _forward_only(token_flops(teacher.shape, teacher.model, span.load))
        teaching = _training(teacher, span, teacher_flops, 1, False, backward=False)
        parts["teacher"] = sum(teaching.values())
    if algorithm.has_critic:
        # Values come from one pass over all responses, whatever the number of the critic's steps.
        critic_scenario = scenario.critic_scenario
        critic = token_flops(critic_scenario.shape, config.model, span.load, critic=True)
        value_flops = _forward_only(critic)
        values = _training(critic_scenario, span, value_flops, 1, True, backward=False)
        update = _training(critic_scenario, span, critic, algorithm.critic_steps, True)
        parts["value"] = sum(values.values())
        parts["update critic"] = sum(update.values())
    if config.trains_policy:
        epoch = _training(scenario, span, policy, algorithm.policy_steps, False)
        parts["update policy"] = sum(epoch.values()) * algorithm.policy_epochs
    if config.generates:
        parts["sync"] = _sync_seconds(scenario)
    if config.offload:
        parts["offload"] = _offload_seconds(scenario)
    if config.rollout.rounds_ahead:
        # Generation goes on meanwhile: what it takes longer is waited for.
        training = sum(parts.values()) - parts["generate"]
        parts["generate"] = max(0.0, parts["generate"] - training)
    return Seconds(parts)


def _forward_only(flops: TokenFlops) -> TokenFlops:
    """Return the FLOP of a pass without gradients in the place of those of training."""
    return TokenFlops(0, flops.forward, 0)


def _sync_seconds(scenario: Scenario) -> float:
    """Return the seconds to write an engine's share of the weights once and to receive what its rank lacks of it."""
    config = scenario.config
    gpu = scenario.gpu
    assert isinstance(config, RLConfig)
    parallel = config.parallel
    counts = count_parameters(scenario.shape)
    weight_bytes = sum(counts.values()) * DTYPE_BYTES[config.model.dtype]
    engine_share = weight_bytes / config.rollout.tp
    model_ranks = parallel.tp * parallel.pp
    received = engine_share * (1 - 1 / model_ranks)
    if config.rollout.ranks:  # they hold nothing themselves
        received = engine_share
    # Stages are the outermost dimension of the ranks, so with a pipeline shards come from all over the world.
    near = parallel.pp == 1 and not config.rollout.ranks
    ranks_apart = parallel.tp if near else scenario.world
    copying = 2 * engine_share / gpu.bandwidth
    receiving = received / _link_rate(gpu, ranks_apart)
    return copying + receiving


def _offload_seconds(scenario: Scenario) -> float:
    """Return the seconds in which the models' tensors go to host memory and come back; gradients are not copied."""
    config = scenario.config
    assert isinstance(config, RLConfig)
    algorithm = config.algorithm
    policy = model_state(scenario.shape, scenario.model, config.parallel, scenario.dp)
    size = policy.weights + policy.optimizer
    if algorithm.has_critic:
        critic = scenario.critic_scenario
        state = model_state(critic.shape, config.model, critic.config.parallel, critic.dp, critic=True)
        if config.critic_shares_base:
            state = state.without_frozen()
        size += state.weights + state.optimizer
    if config.has_reference:
        size += policy.weights
    teacher = scenario.teacher_scenario
    if teacher:
        size += model_state(teacher.shape, teacher.model, teacher.config.parallel, teacher.dp).weights
    return 2 * size / (WIRE * scenario.gpu.host)


def bubble(scenario: Scenario, span: Span, share: int = 1) -> float:
    """Return the idle share that the pipeline adds to a step's work."""
    parallel = scenario.config.parallel
    packs = scenario.micro_batches(span, share)
    # A rank works `vpp` slots for each pack, one for each of its parts, and idles for `pp - 1` of them in the ramps.
    slots = parallel.vpp * packs
    return (parallel.pp - 1) / slots


def _training(
    scenario: Scenario,
    span: Span,
    flops: TokenFlops,
    steps: int,
    critic: bool,
    backward: bool = True,
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
    token_work = flops.training + recomputed
    replica_rate = parallel.ranks * gpu.flops * EFFICIENCY
    parts = {"matrix work": tokens * token_work / replica_rate}
    # A backward pass counts as two; full recomputation adds a forward pass.
    passes = 1
    if backward:
        passes = 4 if config.model.recompute == "full" else 3
    parts |= _replica_traffic(scenario, tokens, passes)
    idle = bubble(scenario, span, steps) * sum(parts.values())
    if parallel.pp > 1:
        parts["bubble"] = idle
    if backward:
        # The reduction of gradients hides behind the last pack's backward pass, two thirds of its time.
        busy = sum(parts.values()) - idle
        last_backward = busy / packs * 2 / 3
        traffic, optimizer = _optimizer_step(scenario, critic)
        exposed = traffic
        if parallel.overlap:
            exposed = max(0.0, traffic - last_backward)
        parts["data-parallel traffic"] = exposed * steps
        parts["optimizer"] = optimizer * steps
    return parts


def _replica_traffic(scenario: Scenario, tokens: float, passes: int) -> dict[str, float]:
    """Return the seconds of elementwise work and of traffic within a replica, for ``tokens`` on each replica."""
    config = scenario.config
    shape = scenario.shape
    gpu = scenario.gpu
    parallel = config.parallel
    tp = parallel.tp
    cp = parallel.cp
    hidden = shape.hidden
    dtype_bytes = DTYPE_BYTES[config.model.dtype]
    rows = tokens / cp
    layers = shape.layers / parallel.pp
    sp_rows = rows / tp if parallel.sequence_parallel else rows
    stream_bytes = sp_rows * hidden * dtype_bytes
    ffn_bytes = rows * shape.ffn / tp * dtype_bytes
    # `_STREAM_PASSES` and `_FFN_PASSES` count those of a forward and a backward pass: three.
    share_of_passes = passes / 3
    layer_bytes = _STREAM_PASSES * stream_bytes + _FFN_PASSES * ffn_bytes
    parts = {"elementwise": share_of_passes * layers * layer_bytes / gpu.bandwidth}
    has_backward = passes > 1
    if tp > 1:
        # Two all-reduces, or their two halves, a layer and pass; sequence parallelism gathers twice more going back.
        reductions = 2
        if has_backward:
            reductions = 2 * (passes - 1)
        # On a ring each half of an all-reduce sends (n - 1) / n of the tensor.
        volume = reductions * 2 * rows * hidden * dtype_bytes * (tp - 1) / tp
        if parallel.sequence_parallel and has_backward:
            volume *= 1.25
        link_rate = _link_rate(gpu, tp)
        parts["tensor-parallel traffic"] = layers * volume / link_rate
    if cp > 1:
        key_value_bytes = 2 * shape.kv_heads * shape.head_dim / tp * dtype_bytes
        volume = rows * (cp - 1) * key_value_bytes * passes
        link_rate = _link_rate(gpu, tp * cp)
        # Half of it is taken to hide behind attention.
        parts["context-parallel traffic"] = 0.5 * layers * volume / link_rate
    if parallel.pp > 1:
        # Activations go on to the next stage, and their gradients come back.
        directions = 2 if has_backward else 1
        volume = sp_rows * hidden * dtype_bytes * parallel.vpp * directions
        link_rate = _link_rate(gpu, tp * cp * parallel.pp)
        parts["pipeline traffic"] = volume / link_rate
    return parts


def _link_rate(gpu: Gpu, ranks_apart: int) -> float:
    """Return the bytes a second between ranks that lie within ``ranks_apart`` neighbouring ones."""
    rate = gpu.link
    if ranks_apart > gpu.per_node:
        rate = gpu.network
    return WIRE * rate


def _optimizer_step(scenario: Scenario, critic: bool) -> tuple[float, float]:
    """Return the seconds of the data-parallel traffic and of Adam in one optimizer step of the first stage."""
    config = scenario.config
    parallel = config.parallel
    gpu = scenario.gpu
    dp = scenario.dp
    ranks = dp * parallel.cp
    state = model_state(scenario.shape, config.model, parallel, dp, critic=critic)
    trained = state.trained
    # Reduce-scatter of gradients and all-gather of weights, or both halves of an all-reduce of gradients.
    gathered = GRADIENT_BYTES
    owned: float = trained
    if parallel.distributed_optimizer:
        gathered = DTYPE_BYTES[config.model.dtype]
        owned = trained / ranks
    sent_bytes = GRADIENT_BYTES + gathered
    volume = trained * sent_bytes * (ranks - 1) / ranks
    # The data-parallel ranks are spread over all nodes.
    link_rate = _link_rate(gpu, scenario.world)
    update = owned * _OPTIMIZER_PASS / gpu.bandwidth
    return volume / link_rate, update


def generation_seconds(scenario: Scenario, span: Span) -> float:
    """Return the seconds to generate an iteration's responses: each decoding step reads the weights and the cache.

    Engines run as many sequences at once as their cache has room for; at the end the longest run on alone.
    """
    config = scenario.config
    shape = scenario.shape
    gpu = scenario.gpu
    assert isinstance(config, RLConfig)
    rollout = config.rollout
    dtype = config.model.dtype
    engine = engine_memory(rollout, shape, gpu, dtype, config.offload)
    token_bytes = cache_bytes_per_token(shape, rollout, dtype)
    mean_tokens = span.load.tokens
    requests = config.prompts * config.responses * rollout.tp / scenario.engine_ranks
    cached_sequences = engine["vLLM cache"] / token_bytes / mean_tokens
    sequences = min(rollout.max_num_seqs, requests, cached_sequences)
    # A cache without room is the concern of the plan of memory; here it must not divide by zero.
    running = max(1.0, sequences)
    weight_bytes = engine["vLLM weights"]
    # On average a running sequence has half of its cache.
    read_bytes = weight_bytes + running * token_bytes * mean_tokens / 2
    step_seconds = read_bytes / gpu.bandwidth + DECODE_OVERHEAD
    steady = requests / running * mean_tokens * step_seconds
    last_step_seconds = weight_bytes / gpu.bandwidth + DECODE_OVERHEAD
    tail_steps = span.limit - mean_tokens
    tail = tail_steps * last_step_seconds
    policy = token_flops(shape, config.model, span.load)
    prefill_flops = requests * mean_tokens * policy.forward
    engine_rate = rollout.tp * gpu.flops * EFFICIENCY
    return steady + tail + prefill_flops / engine_rate
