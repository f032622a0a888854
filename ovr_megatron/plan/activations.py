"""Activation memory of one rank: what the backward pass keeps, and the most that is alive at once.

An estimate by counting the tensors that the layers of `model/` save.  Numbers of one layer, a row: T rows of the pack
on this rank, S of them where sequence parallelism cuts them; D width, Q query and K key columns, F perceptron columns
of this rank, N query heads:

    none       S 4D + 2 norm scales + attention + T 3F      (the perceptron's gate and up 2F, their product F)
    selective  S 3D + 1 norm scale + attention              (the perceptron is computed again)
    full       S D                                          (the layer is computed again)
    attention  T (3Q + 3K) + N  with Transformer Engine: query, key, output and the fused product, which the value is a
               view of;  T 4Q + N  with ours, keys and values repeated, and T Q more where documents are batched;
               T (3Q + 3K) + N  with ours on a CPU without context parallelism, where query heads share them

On a CPU a layer keeps T F more, the gate's activation.  The head keeps its logits where they are few.

To this come the tower's layers, the head (`model/heads.py`: tiles, float32 gradient of its input, gradient of its
weight) and, at the peak, what the backward pass of one layer holds beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ovr_megatron.config import ModelConfig, ParallelConfig
from ovr_megatron.model.heads import keeps_logits, tile_sides
from ovr_megatron.model.shape import ModelShape
from ovr_megatron.plan.parameters import NUMBER_BYTES, stage_layers
from ovr_megatron.weights.table import padded_vocab

_FLOAT, _INDEX = 4, 8


@dataclass(frozen=True)
class PackShape:
    """One micro-batch: tokens of a whole pack, how many of them are scored, and patches of its images.

    ``batched`` is the rows that attention without Transformer Engine works on over the rows of the pack: documents of
    like length are padded to one batch (at most 1.5), 0 where the pack is one document or documents of one length.
    ``batched_patches`` is the same for the windows of the vision tower.
    """

    tokens: int
    scored: int
    patches: int = 0
    batched: float = 1.0
    batched_patches: float = 1.0


@dataclass(frozen=True)
class Kernels:
    """Whose layers run (``transformer_engine`` or ``local``), and on which device (``cuda`` or ``cpu``)."""

    layers: str = "transformer_engine"
    device: str = "cuda"


@dataclass(frozen=True)
class Activations:
    """Bytes on one rank.

    ``saved``: kept by all micro-batches in flight, the tower's part ``vision`` included.  ``working``: what the peak
    has beyond them.  ``forward``: the peak of a pass without gradients.
    """

    saved: int
    vision: int
    working: int
    forward: int

    @property
    def peak(self) -> int:
        """Most bytes at once in a forward and backward pass."""
        return self.saved + self.working


@dataclass(frozen=True)
class _Layer:
    """Sizes of a transformer layer on one rank: ``rows`` of the pack, ``thin`` where sequence parallelism cuts."""

    rows: int
    thin: int
    keys: int
    width: int
    query: int
    key: int
    heads: int
    ffn: int
    number: int  # bytes
    batched: float
    kernels: Kernels
    trained: bool = True
    biased: bool = False
    shares_keys: bool = False  # query heads of attention without Transformer Engine share keys and values
    narrow: bool = False  # inputs of matrix products are kept in 8 bits

    @property
    def input(self) -> int:
        return self.thin * self.width * self.number

    @property
    def norm(self) -> int:
        """A norm's output, which the product after it keeps, and its scale."""
        kept = self.input // (self.number if self.narrow else 1) if self.trained else 0
        extra = self.thin * self.width * (_FLOAT + self.number) if self._norm_in_parts else 0
        return kept + extra + self.thin * _FLOAT

    @property
    def _norm_in_parts(self) -> bool:
        return self.kernels == Kernels("local", "cuda")

    @property
    def attention(self) -> int:
        if self.kernels.layers == "transformer_engine":
            return self.rows * ((3 * self.query + 3 * self.key) * self.number + self.heads * _FLOAT)
        grouped = self.batched > 0
        key = self.key if self.shares_keys else self.query
        value = key
        if not grouped and key == self.key:
            value = self.query + 2 * self.key  # a view of the fused product
        rows, keys = self.rows * (self.batched or 1), self.keys * (self.batched or 1)
        kept = rows * 2 * self.query + keys * (key + value) + (self.rows * self.query if grouped else 0)
        return int(kept * self.number + rows * self.heads * _FLOAT)

    @property
    def on_cpu(self) -> bool:
        return self.kernels == Kernels("local", "cpu")

    @property
    def gate_up(self) -> int:
        return self.rows * 2 * self.ffn * self.number

    @property
    def product(self) -> int:
        kept = self.gate_up // 2
        return (kept // self.number if self.narrow else kept) if self.trained else 0

    @property
    def perceptron(self) -> int:
        return self.norm + self.gate_up + self.product + (self.gate_up // 2 if self.on_cpu else 0)

    @property
    def whole(self) -> int:
        """All that a layer keeps."""
        return 2 * self.input + self.norm + self.attention + self.perceptron

    def kept(self, recompute: str) -> int:
        """What a layer keeps between its forward and its backward pass."""
        again = {"none": 0, "selective": self.perceptron, "full": self.whole - self.input}[recompute]
        return self.whole - again

    def backward(self, recompute: str) -> int:
        """Bytes beyond what is kept, at the moment of the backward pass that has most of them."""
        again = self.whole - self.kept(recompute)
        if recompute != "none":  # what is computed again has its input, its output and that one's gradient beside it
            again += 3 * self.input
        perceptron = self.gate_up // 2  # the product's gradient; that of gate and up takes their place
        of_attention = self.rows * (3 * self.query + 2 * self.key) * self.number - self.perceptron
        return again + self.input + max(perceptron, of_attention)

    @property
    def forward(self) -> int:
        """Peak of a layer without gradients: its input, and the perceptron's or attention's tensors."""
        products = 2 if self.biased else 1
        attending = self.attention + products * self.rows * (self.query + 2 * self.key) * self.number
        return 3 * self.input + max(self.gate_up + self.gate_up // (1 if self.on_cpu else 2), attending)


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
    """Activation memory of a rank of pipeline ``stage``, in bytes.

    Args:
        shape: sizes.
        model: number format, recomputation and what is frozen.
        parallel: layout, checked by `check_layout`.
        pack: the largest micro-batch.
        micro_batches: of a step on each data-parallel replica.
        stage: from 0.
        critic: a value head in place of the language-model head.
        kernels: default: Transformer Engine's on a GPU, unless ``model.layers`` is ``local``.
    """
    own_layers = model.layers == "local" or model.dtype == "float32"
    kernels = kernels or Kernels("local" if own_layers else "transformer_engine")
    text = _language_layer(shape, model, parallel, pack, kernels)
    tower = _tower_layer(shape, model, parallel, pack, kernels)
    layers = stage_layers(shape.layers, parallel)[stage]
    first, last = stage == 0, stage == parallel.pp - 1
    flights = _in_flight(parallel, stage, micro_batches)
    table = text.rows * 2 * shape.head_dim * _FLOAT
    one = layers * text.kept(model.recompute) + table * parallel.vpp
    if parallel.pp > 1:
        one += text.input * parallel.vpp  # what was sent to the next stage
    vision = _tower_saved(shape, model, tower) if first else 0
    saved = int(flights * (one + vision))
    # Sequence parallelism gathers a layer's input in a buffer that stays, and a gradient beside it.
    gathered = text.rows * text.width * text.number if parallel.sequence_parallel else 0
    head = _Head(shape, parallel, pack, text, critic)
    # At the end of the last layer's forward pass the head works; then the layers go back one by one.
    working: float = text.backward(model.recompute)
    if last:
        working = max(working, head.backward, head.kept + text.input // text.number * 4 * _FLOAT)
    if first and pack.patches:
        # Once the language model's are gone, the tower's last layer goes back.
        working = max(working, _tower_working(shape, model, tower) - flights * one)
    forward = max(text.forward + table, head.forward if last else 0) + gathered
    if first and pack.patches:
        forward = max(forward, tower.forward)
    return Activations(saved, int(flights * vision), int(working) + 2 * gathered, int(forward))


def _language_layer(
    shape: ModelShape, model: ModelConfig, parallel: ParallelConfig, pack: PackShape, kernels: Kernels
) -> _Layer:
    tp, rows = parallel.tp, -(-pack.tokens // parallel.cp)
    return _Layer(
        rows=rows,
        thin=-(-rows // tp) if parallel.sequence_parallel else rows,
        keys=pack.tokens if parallel.cp > 1 and kernels.layers == "local" else rows,
        width=shape.hidden,
        query=shape.heads * shape.head_dim // tp,
        key=shape.kv_heads * shape.head_dim // tp,
        heads=shape.heads // tp,
        ffn=shape.ffn // tp,
        number=NUMBER_BYTES[model.dtype],
        batched=pack.batched if parallel.cp == 1 else max(pack.batched, 1.0),
        kernels=kernels,
        trained=not model.freeze_language,
        shares_keys=kernels.device == "cpu" and parallel.cp == 1,
        narrow=model.fp8 != "none",
    )


def _tower_layer(
    shape: ModelShape, model: ModelConfig, parallel: ParallelConfig, pack: PackShape, kernels: Kernels
) -> _Layer:
    vision, tp = shape.vision, parallel.tp
    rows = -(-pack.patches // parallel.cp)
    return _Layer(
        rows=rows,
        thin=rows,
        keys=rows,
        width=vision.hidden,
        query=vision.hidden // tp,
        key=vision.hidden // tp,
        heads=vision.heads // tp,
        ffn=vision.ffn // tp,
        number=NUMBER_BYTES[model.dtype],
        batched=pack.batched_patches,
        kernels=kernels,
        trained=not model.freeze_vision,
        biased=True,
    )


def _in_flight(parallel: ParallelConfig, stage: int, micro_batches: int) -> float:
    """Micro-batches whose activations a stage keeps at once; an interleaved part counts its share of one."""
    ahead = parallel.pp - stage
    if parallel.vpp == 1:
        return min(ahead, micro_batches)
    parts = 2 * (ahead - 1) + (parallel.vpp - 1) * parallel.pp + 1
    return min(parts, micro_batches * parallel.vpp) / parallel.vpp


def _merger_sizes(shape: ModelShape, tower: _Layer) -> tuple[int, int]:
    """Bytes of all patches as the merger's input, and of its hidden layer on this rank."""
    whole = tower.rows * tower.width * tower.number
    return whole, whole * tower.query // tower.width


def _tower_saved(shape: ModelShape, model: ModelConfig, tower: _Layer) -> int:
    if not tower.rows:
        return 0
    kept = 0
    if not model.freeze_vision:
        patches = tower.rows * shape.vision.patch_dim * tower.number if tower.number < _FLOAT else 0
        table = tower.rows * 2 * (tower.width // shape.vision.heads) * _FLOAT
        kept += shape.vision.depth * tower.whole + patches + table
    if not (model.freeze_vision and model.freeze_merger):
        whole, hidden = _merger_sizes(shape, tower)
        inputs = 0 if model.freeze_merger else whole + hidden
        kept += (0 if model.freeze_vision and model.freeze_merger else whole) + hidden + inputs
    return kept


def _tower_working(shape: ModelShape, model: ModelConfig, tower: _Layer) -> int:
    features = tower.rows // shape.vision.merge**2 * shape.hidden * tower.number
    whole, hidden = _merger_sizes(shape, tower)
    return features + (max(tower.backward("none"), whole + hidden) if not model.freeze_vision else whole + hidden)


class _Head:
    """The last stage's norm and head: what they keep, and their peaks beyond what the layers keep."""

    def __init__(self, shape: ModelShape, parallel: ParallelConfig, pack: PackShape, text: _Layer, critic: bool):
        scored = min(-(-pack.scored // parallel.cp), text.rows)
        wide, number = scored * shape.hidden, text.number
        gathered = text.rows * shape.hidden * number if parallel.sequence_parallel else text.input
        self.kept = text.input + text.thin * _FLOAT + wide * (_FLOAT if critic else number)  # values are of float32
        if text.kernels == Kernels("local", "cuda"):
            self.kept += text.thin * text.width * (_FLOAT + number)
        if critic:
            self.forward = self.kept + gathered + (wide * number if number < _FLOAT else 0)
            self.backward = self.kept + wide * number + gathered
            return
        vocab = padded_vocab(shape, parallel.tp) // parallel.tp
        high, rows = tile_sides(max(scored, 1), vocab, torch.device(text.kernels.device))
        tile = high * rows
        scores = scored * (3 * _FLOAT + 2 * _INDEX)
        is_kept = keeps_logits(scored, vocab, torch.device(text.kernels.device))
        if is_kept:
            scores += scored * vocab * _FLOAT
        forward_tiles = backward_tiles = tile * _FLOAT  # logits, and their gradient written over them
        product = rows * shape.hidden * _FLOAT
        if number < _FLOAT:  # the gradient is rounded apart, and its product added to a float32 sum
            backward_tiles = tile * number + (0 if is_kept else tile * _FLOAT) + product
        if text.kernels.device == "cpu":
            forward_tiles += tile * _FLOAT
            if number < _FLOAT:  # both sides of a product are widened
                widened = (high + rows) * shape.hidden * _FLOAT
                forward_tiles = max(forward_tiles, tile * _FLOAT + widened)
                backward_tiles += tile * _FLOAT + widened - product  # a side as large as the product among them
        self.forward = self.kept + scores + forward_tiles + (gathered if parallel.sequence_parallel else 0)
        weight = vocab * shape.hidden * number
        gradient = wide * (_FLOAT + (number if number < _FLOAT else 0))
        of_product = backward_tiles + product  # the sum of a block of the weight's gradient
        self.kept += scores
        self.backward = self.kept + weight + max(gradient + of_product, wide * number + gathered)
