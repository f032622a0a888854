"""Activation memory of one rank: the tensors that autograd stores for the backward pass, and the peak of live bytes.

The estimate counts the tensors that the layers of `model/` store, as `ovr_megatron.plan.layer` lists them.  To this
come the tower's layers, the head (`ovr_megatron.plan.head`) and, at the peak, the transient tensors of the backward
pass of one layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ovr_megatron.config import ModelConfig, ParallelConfig
from ovr_megatron.families import ModelShape, family_of
from ovr_megatron.families.adapters import has_adapter
from ovr_megatron.plan.head import head_bytes
from ovr_megatron.plan.layer import FLOAT_BYTES, Kernels, LayerSizes
from ovr_megatron.plan.parameters import DTYPE_BYTES, stage_layers


@dataclass(frozen=True)
class PackShape:
    """One micro-batch: tokens of a whole pack, how many of them are scored, and patches of its images.

    ``batched`` is a ratio: rows that attention without Transformer Engine works on, by rows of the pack.  Documents of
    like length are padded to one batch (at most 1.5); 0 where the pack is one document or documents of one length.
    ``batched_patches`` is the same for the windows of the vision tower.  On a CPU without context parallelism neither
    matters: the batches are not stored for the backward pass.
    """

    tokens: int
    scored: int
    patches: int = 0
    batched: float = 1.0
    batched_patches: float = 1.0


@dataclass(frozen=True)
class Activations:
    """Bytes on one rank.

    ``saved``: stored by all micro-batches in flight, the tower's part ``vision`` included.  ``working``: transient
    bytes of the peak, beyond ``saved``.  ``forward``: the peak of a pass without gradients.
    """

    saved: int
    vision: int
    working: int
    forward: int

    @property
    def peak(self) -> int:
        """Return the peak bytes of a forward and backward pass."""
        return self.saved + self.working


@lru_cache(maxsize=4096)  # a search asks again for every layout of the engines
def activations(
    shape: ModelShape,
    model: ModelConfig,
    parallel: ParallelConfig,
    pack: PackShape,
    micro_batches: int = 1,
    stage: int = 0,
    critic: bool = False,
    kernels: Kernels | None = None,
) -> Activations:
    """Estimate the activation memory of a rank of pipeline ``stage``, in bytes.

    Args:
        shape: sizes.
        model: dtype, recomputation and what is frozen.
        parallel: layout, checked by `check_layout`.
        pack: the largest micro-batch.
        micro_batches: of a step on each data-parallel replica.
        stage: from 0.
        critic: a value head in place of the language-model head.
        kernels: default: Transformer Engine's on a GPU, unless ``model.layers`` is ``local``.
    """
    kernels = kernels or _default_kernels(model)
    layer = _language_layer(shape, model, parallel, pack, kernels)
    tower_layer = _tower_layer(shape, model, parallel, pack, kernels)
    is_first = stage == 0
    is_last = stage == parallel.pp - 1
    has_images = is_first and pack.patches > 0
    in_flight = _in_flight(parallel, stage, micro_batches)
    rotary_table = layer.rows * 2 * shape.head_dim * FLOAT_BYTES
    layers = stage_layers(shape.layers, parallel)[stage]
    language = layers * layer.stored(model.recompute) + _stored_beside_layers(parallel, layer, rotary_table)
    vision = _tower_stored(shape, model, tower_layer) if is_first else 0
    stored = language + vision

    # Sequence parallelism gathers a layer's input in a buffer that stays, and a gradient beside it.
    gathered = 0
    if parallel.sequence_parallel:
        gathered = layer.rows * layer.width * layer.dtype_bytes
    head = head_bytes(shape, parallel, pack.scored, layer, critic)
    # At the end of the last layer's forward pass the head works; then the layers go back one by one.
    working: float = layer.backward(model.recompute)
    forward = layer.forward + rotary_table
    if is_last:
        input_elements = layer.input // layer.dtype_bytes
        final_norm = input_elements * 4 * FLOAT_BYTES  # its backward pass works on float32 copies
        working = max(working, head.backward, head.stored + final_norm)
        forward = max(forward, head.forward)
    forward += gathered
    if has_images:
        # The tower's last layer goes back when the language model's activations are freed.
        tower_working = _tower_working(shape, model, tower_layer)
        working = max(working, tower_working - in_flight * language)
        forward = max(forward, tower_layer.forward)
    return Activations(
        saved=int(in_flight * stored),
        vision=int(in_flight * vision),
        working=int(working) + 2 * gathered,
        forward=int(forward),
    )


def _stored_beside_layers(parallel: ParallelConfig, layer: LayerSizes, rotary_table: int) -> int:
    """Return what a micro-batch stores beside the layers: a rotary table and, in a pipeline, what was sent on."""
    size = rotary_table
    if parallel.pp > 1:
        size += layer.input
    # Each interleaved part has a table of its own, and sends its output to the next stage.
    return size * parallel.vpp


def _default_kernels(model: ModelConfig) -> Kernels:
    # In float32 the model has our layers, too: Transformer Engine multiplies in TF32 (`choose_layer_classes`).
    if model.layers == "local" or model.dtype == "float32":
        return Kernels("local")
    return Kernels()


def _language_layer(
    shape: ModelShape,
    model: ModelConfig,
    parallel: ParallelConfig,
    pack: PackShape,
    kernels: Kernels,
) -> LayerSizes:
    tp = parallel.tp
    cp = parallel.cp
    is_local = kernels.layers == "local"
    rows = -(-pack.tokens // cp)
    sp_rows = rows
    if parallel.sequence_parallel:
        sp_rows = -(-rows // tp)
    key_rows = rows
    batched = 0 if kernels.device == "cpu" else pack.batched
    if cp > 1:
        batched = max(batched, 1.0)
        # Our attention gathers the keys of all ranks; Transformer Engine's passes them around a ring.
        if is_local:
            key_rows = pack.tokens
    query_columns = shape.heads * shape.head_dim
    key_columns = shape.kv_heads * shape.head_dim
    return LayerSizes(
        rows=rows,
        sp_rows=sp_rows,
        key_rows=key_rows,
        width=shape.hidden,
        query_width=query_columns // tp,
        key_width=key_columns // tp,
        heads=shape.heads // tp,
        ffn=shape.ffn // tp,
        dtype_bytes=DTYPE_BYTES[model.dtype],
        batched=batched,
        kernels=kernels,
        attention_trains=model.trains_language or has_adapter(model.lora, "attention"),
        mlp_trains=model.trains_language or has_adapter(model.lora, "mlp"),
        adapter_rank=model.lora.rank,
        shares_keys=kernels.device == "cpu",
        has_head_norms=bool(family_of(shape).decoder_options(shape).get("qk_layernorm")),
        # An adapter computes in the parameters' dtype, and so stores its input in it.
        stores_fp8=model.fp8 != "none" and not model.lora.rank,
    )


def _tower_layer(
    shape: ModelShape,
    model: ModelConfig,
    parallel: ParallelConfig,
    pack: PackShape,
    kernels: Kernels,
) -> LayerSizes:
    vision = shape.vision
    tp = parallel.tp
    rows = -(-pack.patches // parallel.cp)
    # Its tensors are [T, E] on every rank: sequence parallelism does not reach the tower.
    return LayerSizes(
        rows=rows,
        sp_rows=rows,
        key_rows=rows,
        width=vision.hidden,
        query_width=vision.hidden // tp,
        key_width=vision.hidden // tp,
        heads=vision.heads // tp,
        ffn=vision.ffn // tp,
        dtype_bytes=DTYPE_BYTES[model.dtype],
        batched=0 if kernels.device == "cpu" else pack.batched_patches,
        kernels=kernels,
        attention_trains=model.trains_vision or (model.adapts_vision and has_adapter(model.lora, "attention")),
        mlp_trains=model.trains_vision or (model.adapts_vision and has_adapter(model.lora, "mlp")),
        adapter_rank=model.lora.rank if model.adapts_vision else 0,
        has_bias=True,
        has_gate=vision.has_gate,
        has_layer_norm=vision.has_layer_norm,
    )


def _in_flight(parallel: ParallelConfig, stage: int, micro_batches: int) -> float:
    """Count the micro-batches whose activations a stage stores at once; an interleaved part counts its share of one."""
    vpp = parallel.vpp
    later_stages = parallel.pp - stage
    if vpp == 1:
        return min(later_stages, micro_batches)
    # Megatron's interleaved schedule warms up with so many parts on this stage, and one more is at work.
    warm_up = 2 * (later_stages - 1) + (vpp - 1) * parallel.pp
    parts = min(warm_up + 1, micro_batches * vpp)
    return parts / vpp


def _merger_bytes(layer: LayerSizes) -> tuple[int, int]:
    """Return bytes of all patches as the merger's input, and of its hidden layer on this rank."""
    inputs = layer.rows * layer.width * layer.dtype_bytes
    hidden = inputs * layer.query_width // layer.width
    return inputs, hidden


def _tower_stored(shape: ModelShape, model: ModelConfig, layer: LayerSizes) -> int:
    """Return the bytes that the vision tower and its merger store for one micro-batch."""
    if not layer.rows:
        return 0
    vision = shape.vision
    stored = 0
    if model.trains_vision or model.adapts_vision:
        # Patches arrive in float32; only a cast to a narrower dtype makes a copy.
        patches = 0
        if layer.dtype_bytes < FLOAT_BYTES:
            patches = layer.rows * vision.patch_dim * layer.dtype_bytes
        head_dim = layer.width // vision.heads
        rotary_table = layer.rows * 2 * head_dim * FLOAT_BYTES
        layers = vision.depth * layer.all_stored
        stored += layers + patches + rotary_table
    if model.trains_vision or model.trains_merger or model.adapts_vision:
        merger_input, hidden = _merger_bytes(layer)
        merger = merger_input + hidden
        # As in a layer, a frozen matrix does not store its input.
        if model.trains_merger:
            merger *= 2
        stored += (1 + vision.layer_features) * merger
    # They are there until the layers that they are added to have run, and stay where these are recomputed.
    features = layer.rows // vision.merge**2 * shape.hidden * layer.dtype_bytes
    return stored + vision.layer_features * features


def _tower_working(shape: ModelShape, model: ModelConfig, layer: LayerSizes) -> int:
    """Return the peak transient bytes of the tower's backward pass."""
    feature_rows = layer.rows // shape.vision.merge**2
    features = (1 + shape.vision.layer_features) * feature_rows * shape.hidden * layer.dtype_bytes
    merger = sum(_merger_bytes(layer))
    if not (model.trains_vision or model.adapts_vision):
        return features + merger
    # The tower is not recomputed, whatever the language model's layers do.
    layer_backward = layer.backward("none")
    return features + max(layer_backward, merger)
