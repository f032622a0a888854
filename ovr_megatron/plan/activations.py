"""Activation memory of one rank: the tensors that autograd stores for the backward pass, and the peak of live bytes.

The estimate counts the tensors that the layers of `model/` store.  Elements of one layer, by row of the table: T rows
of the pack on this rank, S of them where sequence parallelism cuts them; D width, Q query and K key columns, F MLP
columns of this rank, N query heads:

    none       S 4D + 2 norm scales + attention + T 3F      (the MLP's gate and up 2F, their product F)
    selective  S 3D + 1 norm scale + attention              (the MLP is recomputed)
    full       S D                                          (the layer is recomputed)
    attention  T (3Q + 3K) + N  with Transformer Engine: query, key, output and the fused product, which the value is a
               view of;  T 4Q + N  with ours, keys and values repeated, and T Q more where documents are batched;
               T (3Q + 3K) + N  with ours on a CPU without context parallelism, where query heads share them

On a CPU a layer stores T F more, the gate's activation.  The head stores its logits where they are few.

To this come the tower's layers, the head (`model/heads.py`: tiles, float32 gradient of its input, gradient of its
weight) and, at the peak, the transient tensors of the backward pass of one layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ovr_megatron.config import ModelConfig, ParallelConfig
from ovr_megatron.families import ModelShape
from ovr_megatron.model.heads import keeps_logits, tile_sides
from ovr_megatron.plan.parameters import DTYPE_BYTES, stage_layers
from ovr_megatron.weights.table import padded_vocab

_FLOAT = 4  # bytes
_INDEX = 8


@dataclass(frozen=True)
class PackShape:
    """One micro-batch: tokens of a whole pack, how many of them are scored, and patches of its images.

    ``batched`` is a ratio: rows that attention without Transformer Engine works on, by rows of the pack.  Documents of
    like length are padded to one batch (at most 1.5); 0 where the pack is one document or documents of one length.
    ``batched_patches`` is the same for the windows of the vision tower.
    """

    tokens: int
    scored: int
    patches: int = 0
    batched: float = 1.0
    batched_patches: float = 1.0


@dataclass(frozen=True)
class Kernels:
    """The implementation of the layers (``transformer_engine`` or ``local``) and the device (``cuda`` or ``cpu``)."""

    layers: str = "transformer_engine"
    device: str = "cuda"


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


@dataclass(frozen=True)
class _Layer:
    """Sizes of a transformer layer on one rank; its properties are bytes.

    ``rows`` are rows of the pack, ``sp_rows`` those of them that sequence parallelism leaves this rank, and
    ``key_rows`` the rows of keys and values that attention without Transformer Engine reads.
    """

    rows: int
    sp_rows: int
    key_rows: int
    width: int
    query_width: int
    key_width: int
    heads: int
    ffn: int
    dtype_bytes: int
    batched: float  # as in `PackShape`
    kernels: Kernels
    trains: bool = True
    has_bias: bool = False
    shares_keys: bool = False  # query heads of attention without Transformer Engine share keys and values
    stores_fp8: bool = False  # inputs of matrix products are stored in FP8

    @property
    def is_on_cpu(self) -> bool:
        return self.kernels == Kernels("local", "cpu")

    @property
    def input(self) -> int:
        """Return the bytes of a layer's input, [S, D]."""
        return self.sp_rows * self.width * self.dtype_bytes

    @property
    def norm(self) -> int:
        """Return what a norm stores: its output, as the input of the product that follows, and its scale."""
        # A frozen matrix needs no gradient, so its input is not stored.
        output = self._stored_bytes(self.input) if self.trains else 0
        # Our norm on a GPU is two operations: one stores a float32 copy of the rows, the other the normed rows.
        in_parts = self.kernels == Kernels("local", "cuda")
        copies = self.sp_rows * self.width * (_FLOAT + self.dtype_bytes) if in_parts else 0
        scale = self.sp_rows * _FLOAT
        return output + copies + scale

    @property
    def attention(self) -> int:
        if self.kernels.layers == "transformer_engine":
            columns = 3 * self.query_width + 3 * self.key_width
            return self.rows * (columns * self.dtype_bytes + self.heads * _FLOAT)
        is_batched = self.batched > 0
        key = self.key_width if self.shares_keys else self.query_width
        value = key
        if not is_batched and key == self.key_width:
            value = self.query_width + 2 * self.key_width  # a view of the fused product, which stays with it
        rows = self.rows * (self.batched or 1)
        key_rows = self.key_rows * (self.batched or 1)
        unpadded_output = self.rows * self.query_width if is_batched else 0
        query_and_output = rows * 2 * self.query_width
        elements = query_and_output + key_rows * (key + value) + unpadded_output
        return int(elements * self.dtype_bytes + rows * self.heads * _FLOAT)

    @property
    def gate_up(self) -> int:
        return self.rows * 2 * self.ffn * self.dtype_bytes

    @property
    def gate_product(self) -> int:
        """Return the bytes of gate times up, which the MLP's second matrix stores as its input."""
        return self._stored_bytes(self.gate_up // 2) if self.trains else 0

    @property
    def mlp(self) -> int:
        gate_activation = self.gate_up // 2 if self.is_on_cpu else 0
        return self.norm + self.gate_up + self.gate_product + gate_activation

    @property
    def all_stored(self) -> int:
        """Return the bytes that a layer stores without recomputation."""
        return 2 * self.input + self.norm + self.attention + self.mlp

    def _stored_bytes(self, size: int) -> int:
        """Return the bytes of a stored product input that takes ``size`` bytes in the parameters' dtype."""
        return size // self.dtype_bytes if self.stores_fp8 else size

    def stored(self, recompute: str) -> int:
        """Return the bytes that a layer stores between its forward and its backward pass."""
        recomputed = {"none": 0, "selective": self.mlp, "full": self.all_stored - self.input}[recompute]
        return self.all_stored - recomputed

    def backward(self, recompute: str) -> int:
        """Return the peak transient bytes of the backward pass, beyond the stored activations."""
        recomputed = self.all_stored - self.stored(recompute)
        if recompute != "none":
            recomputed += 3 * self.input  # the recomputed part's input, its output and the gradient of the output
        mlp = self.gate_up // 2  # gradient of the gate product; that of gate and up is written over them
        # When attention's turn comes, the MLP's activations are freed already.
        attention_columns = 3 * self.query_width + 2 * self.key_width
        attention = self.rows * attention_columns * self.dtype_bytes - self.mlp
        return recomputed + self.input + max(mlp, attention)

    @property
    def forward(self) -> int:
        """Return the peak of a layer without gradients: its input, and the MLP's or attention's tensors."""
        qkv_copies = 2 if self.has_bias else 1
        qkv_columns = self.query_width + 2 * self.key_width
        qkv = qkv_copies * self.rows * qkv_columns * self.dtype_bytes
        attention = self.attention + qkv
        # The gate product; on a CPU the activated gate, too.
        mlp = self.gate_up + self.gate_up // (1 if self.is_on_cpu else 2)
        return 3 * self.input + max(mlp, attention)


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
    needs_local = model.layers == "local" or model.dtype == "float32"
    kernels = kernels or Kernels("local" if needs_local else "transformer_engine")
    layer = _language_layer(shape, model, parallel, pack, kernels)
    tower_layer = _tower_layer(shape, model, parallel, pack, kernels)
    layers = stage_layers(shape.layers, parallel)[stage]
    is_first = stage == 0
    is_last = stage == parallel.pp - 1
    in_flight = _in_flight(parallel, stage, micro_batches)

    # Stored by one micro-batch: the layers, the rotary table and, in a pipeline, what was sent to the next stage.
    rotary_table = layer.rows * 2 * shape.head_dim * _FLOAT
    language = layers * layer.stored(model.recompute) + rotary_table * parallel.vpp
    if parallel.pp > 1:
        language += layer.input * parallel.vpp
    vision = _tower_stored(shape, model, tower_layer) if is_first else 0
    saved = int(in_flight * (language + vision))

    # Sequence parallelism gathers a layer's input in a buffer that stays, and a gradient beside it.
    gathered = layer.rows * layer.width * layer.dtype_bytes if parallel.sequence_parallel else 0
    head = _head_bytes(shape, parallel, pack, layer, critic)
    # At the end of the last layer's forward pass the head works; then the layers go back one by one.
    working: float = layer.backward(model.recompute)
    if is_last:
        final_norm = layer.input // layer.dtype_bytes * 4 * _FLOAT  # its backward pass works on float32 copies
        working = max(working, head.backward, head.stored + final_norm)
    if is_first and pack.patches:
        # The tower's last layer goes back when the language model's activations are freed.
        working = max(working, _tower_working(shape, model, tower_layer) - in_flight * language)

    head_forward = head.forward if is_last else 0
    forward = max(layer.forward + rotary_table, head_forward) + gathered
    if is_first and pack.patches:
        forward = max(forward, tower_layer.forward)
    return Activations(saved, int(in_flight * vision), int(working) + 2 * gathered, int(forward))


def _language_layer(
    shape: ModelShape, model: ModelConfig, parallel: ParallelConfig, pack: PackShape, kernels: Kernels
) -> _Layer:
    tp = parallel.tp
    rows = -(-pack.tokens // parallel.cp)
    # Our attention gathers the keys of all context-parallel ranks; Transformer Engine's passes them around a ring.
    gathers_keys = parallel.cp > 1 and kernels.layers == "local"
    return _Layer(
        rows=rows,
        sp_rows=-(-rows // tp) if parallel.sequence_parallel else rows,
        key_rows=pack.tokens if gathers_keys else rows,
        width=shape.hidden,
        query_width=shape.heads * shape.head_dim // tp,
        key_width=shape.kv_heads * shape.head_dim // tp,
        heads=shape.heads // tp,
        ffn=shape.ffn // tp,
        dtype_bytes=DTYPE_BYTES[model.dtype],
        batched=pack.batched if parallel.cp == 1 else max(pack.batched, 1.0),
        kernels=kernels,
        trains=not model.freeze_language,
        shares_keys=kernels.device == "cpu" and parallel.cp == 1,
        stores_fp8=model.fp8 != "none",
    )


def _tower_layer(
    shape: ModelShape, model: ModelConfig, parallel: ParallelConfig, pack: PackShape, kernels: Kernels
) -> _Layer:
    vision = shape.vision
    tp = parallel.tp
    rows = -(-pack.patches // parallel.cp)
    return _Layer(
        rows=rows,
        sp_rows=rows,
        key_rows=rows,
        width=vision.hidden,
        query_width=vision.hidden // tp,
        key_width=vision.hidden // tp,
        heads=vision.heads // tp,
        ffn=vision.ffn // tp,
        dtype_bytes=DTYPE_BYTES[model.dtype],
        batched=pack.batched_patches,
        kernels=kernels,
        trains=not model.freeze_vision,
        has_bias=True,
    )


def _in_flight(parallel: ParallelConfig, stage: int, micro_batches: int) -> float:
    """Count the micro-batches whose activations a stage stores at once; an interleaved part counts its share of one."""
    later_stages = parallel.pp - stage
    if parallel.vpp == 1:
        return min(later_stages, micro_batches)
    parts = 2 * (later_stages - 1) + (parallel.vpp - 1) * parallel.pp + 1
    return min(parts, micro_batches * parallel.vpp) / parallel.vpp


def _merger_bytes(shape: ModelShape, layer: _Layer) -> tuple[int, int]:
    """Return bytes of all patches as the merger's input, and of its hidden layer on this rank."""
    inputs = layer.rows * layer.width * layer.dtype_bytes
    return inputs, inputs * layer.query_width // layer.width


def _tower_stored(shape: ModelShape, model: ModelConfig, layer: _Layer) -> int:
    """Return the bytes that the vision tower and its merger store for one micro-batch."""
    if not layer.rows:
        return 0
    stored = 0
    if not model.freeze_vision:
        # Patches arrive in float32; only a cast to a narrower dtype makes a copy.
        patches = layer.rows * shape.vision.patch_dim * layer.dtype_bytes if layer.dtype_bytes < _FLOAT else 0
        head_dim = layer.width // shape.vision.heads
        rotary_table = layer.rows * 2 * head_dim * _FLOAT
        stored += shape.vision.depth * layer.all_stored + patches + rotary_table
    if not (model.freeze_vision and model.freeze_merger):
        merger_input, hidden = _merger_bytes(shape, layer)
        product_inputs = 0 if model.freeze_merger else merger_input + hidden
        stored += merger_input + hidden + product_inputs
    return stored


def _tower_working(shape: ModelShape, model: ModelConfig, layer: _Layer) -> int:
    """Return the peak transient bytes of the tower's backward pass."""
    features = layer.rows // shape.vision.merge**2 * shape.hidden * layer.dtype_bytes
    merger = sum(_merger_bytes(shape, layer))
    if model.freeze_vision:
        return features + merger
    return features + max(layer.backward("none"), merger)


@dataclass(frozen=True)
class _HeadBytes:
    """Bytes of the last stage's norm and head: stored, and the peaks beyond what the layers store."""

    stored: int
    forward: int
    backward: int


def _head_bytes(
    shape: ModelShape, parallel: ParallelConfig, pack: PackShape, layer: _Layer, critic: bool
) -> _HeadBytes:
    dtype_bytes = layer.dtype_bytes
    scored = min(-(-pack.scored // parallel.cp), layer.rows)
    scored_elements = scored * shape.hidden
    gathered = layer.rows * shape.hidden * dtype_bytes if parallel.sequence_parallel else layer.input
    # The final norm's input and scale, and the scored rows of its output, which the value head widens to float32.
    stored = layer.input + layer.sp_rows * _FLOAT + scored_elements * (_FLOAT if critic else dtype_bytes)
    if layer.kernels == Kernels("local", "cuda"):
        stored += layer.sp_rows * layer.width * (_FLOAT + dtype_bytes)  # as in `_Layer.norm`
    if critic:
        narrow_rows = scored_elements * dtype_bytes if dtype_bytes < _FLOAT else 0
        return _HeadBytes(
            stored=stored,
            forward=stored + gathered + narrow_rows,
            backward=stored + scored_elements * dtype_bytes + gathered,
        )
    vocab = padded_vocab(shape, parallel.tp) // parallel.tp
    scores, forward_tiles, weight_gradient_tiles = _tile_bytes(shape, scored, vocab, layer)
    weight = vocab * shape.hidden * dtype_bytes
    hidden_gradient = scored_elements * (_FLOAT + (dtype_bytes if dtype_bytes < _FLOAT else 0))
    stored += scores
    forward = stored + forward_tiles
    if parallel.sequence_parallel:
        forward += gathered
    tiles = hidden_gradient + weight_gradient_tiles
    rows_gradient = scored_elements * dtype_bytes + gathered
    backward = stored + weight + max(tiles, rows_gradient)
    return _HeadBytes(stored=stored, forward=forward, backward=backward)


def _tile_bytes(shape: ModelShape, scored: int, vocab: int, layer: _Layer) -> tuple[int, int, int]:
    """Return bytes of a vocabulary-parallel head: stored scores, transient tiles of forward, and of backward."""
    dtype_bytes = layer.dtype_bytes
    device = torch.device(layer.kernels.device)
    tile_tokens, tile_rows = tile_sides(max(scored, 1), vocab, device)
    tile = tile_tokens * tile_rows
    scores = scored * (3 * _FLOAT + 2 * _INDEX)
    stores_logits = keeps_logits(scored, vocab, device)
    if stores_logits:
        scores += scored * vocab * _FLOAT
    # Logits, and their gradient written over them.
    forward_tiles = tile * _FLOAT
    backward_tiles = tile * _FLOAT
    product = tile_rows * shape.hidden * _FLOAT
    if dtype_bytes < _FLOAT:  # the gradient is rounded into a tile of its own, and its product added to a float32 sum
        backward_tiles = tile * dtype_bytes + (0 if stores_logits else tile * _FLOAT) + product
    if layer.kernels.device == "cpu":
        forward_tiles += tile * _FLOAT
        if dtype_bytes < _FLOAT:  # a CPU widens both sides of a product to float32
            widened = (tile_tokens + tile_rows) * shape.hidden * _FLOAT
            forward_tiles = max(forward_tiles, tile * _FLOAT + widened)
            backward_tiles += tile * _FLOAT + widened - product  # a side as large as the product is counted in it
    weight_gradient_block = product
    return scores, forward_tiles, backward_tiles + weight_gradient_block
