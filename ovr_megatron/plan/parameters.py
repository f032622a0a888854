"""Parameters of one rank and the bytes that they, their gradients and their optimizer state take: exact, no estimate.

The rules are those of Megatron-Core 0.16.1 (`distributed/param_and_grad_buffer.py`, `optimizer/distrib_optimizer.py`):
float32 gradients lie in contiguous buffers cut into buckets; the distributed optimizer pads every parameter's start to
64 numbers and every bucket to a multiple of its ranks and of 128, and a rank owns an equal slice of every bucket.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ovr_megatron.config import ModelConfig, ParallelConfig
from ovr_megatron.engine import is_frozen
from ovr_megatron.model.shape import ModelShape
from ovr_megatron.weights.table import Row, cut_dim, padded_vocab, rows

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
GRADIENT_BYTES = 4  # the engine reduces gradients in float32
MOMENT_BYTES = 8  # two of Adam's moments in float32
MASTER_BYTES = {"float32": 0, "bfloat16": 4}
_PARAMETER_START, _BUCKET_START = 64, 128
_BUCKET_NUMBERS, _BUCKET_NUMBERS_PER_RANK = 40_000_000, 1_000_000
# Modules register their parameters in this order; buffers are filled from the last to the first.
_ORDER = ("embedding.", "decoder.layers.", "decoder.final_layernorm.", "output_layer.", "vision.", "value_head.")
_WITHIN_LAYER = ("linear_proj.", "linear_qkv.", "linear_fc1.", "linear_fc2.")
_WITHIN_MODULE = ("layer_norm_weight", "bias", "weight")
_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class Parameter:
    """One parameter as a rank holds it; ``alone``: Megatron gives it a bucket of its own."""

    name: str
    numbers: int
    trained: bool
    alone: bool = False


@dataclass(frozen=True)
class Bucket:
    """A slice of a gradient buffer: its size with padding, and where the parameters in it begin and end."""

    numbers: int
    spans: tuple[tuple[int, int], ...]

    def owned(self, rank: int, ranks: int) -> int:
        """Numbers of parameters, without padding, in the slice of optimizer ``rank`` of ``ranks``."""
        size = self.numbers // ranks
        first, last = rank * size, (rank + 1) * size
        return sum(max(0, min(end, last) - max(start, first)) for start, end in self.spans)


@dataclass(frozen=True)
class ModelState:
    """What one rank holds of a model at rest, in bytes, and the number of its parameters.

    ``weights`` includes the padding of the buffer that the distributed optimizer keeps them in.  ``optimizer`` is
    Adam's two moments and, beside bfloat16 weights, a float32 master copy; its step counters are not counted.
    """

    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Bytes of all three."""
        return self.weights + self.gradients + self.optimizer


def count_parameters(shape: ModelShape, critic: bool = False) -> dict[str, int]:
    """Parameters of the whole model by part; a tied head counts once, in the embedding."""
    counts = dict.fromkeys(("vision", "merger", "embedding", "layers", "head"), 0)
    for row in rows(shape, critic):
        counts[_part(row.megatron)] += _numbers(row)
    return counts


def _part(name: str) -> str:
    if name.startswith("vision."):
        return "merger" if name.startswith("vision.merger.") else "vision"
    if name.startswith("embedding."):
        return "embedding"
    return "head" if name in (_HEAD, "value_head.weight") else "layers"


def _numbers(row: Row) -> int:
    return sum(map(math.prod, row.sizes))


def stage_layers(layers: int, parallel: ParallelConfig) -> list[int]:
    """Language-model layers of each pipeline stage; the layout is one that `check_layout` accepts."""
    first, last = parallel.first_stage_layers, parallel.last_stage_layers
    stages = parallel.pp - bool(first) - bool(last)
    between = (layers - first - last) // stages if stages else 0
    counts = [between] * parallel.pp
    counts[0] = first or counts[0]
    counts[-1] = last or counts[-1]
    return counts


def rank_parameters(
    shape: ModelShape, model: ModelConfig, parallel: ParallelConfig, critic: bool, stage: int
) -> list[list[Parameter]]:
    """Parameters of pipeline ``stage``, one list for each of its interleaved parts, in Megatron's order."""
    layers = stage_layers(shape.layers, parallel)[stage] // parallel.vpp
    found = _ordered(shape, critic)
    shared = shape.tied and not critic and parallel.pp > 1
    parts = []
    for part in range(parallel.vpp):
        first = stage == 0 and part == 0
        last = stage == parallel.pp - 1 and part == parallel.vpp - 1
        held: list[Parameter] = []
        for row in found:
            name = row.megatron
            if name.startswith("decoder.layers."):
                wanted = int(name.split(".")[2]) < layers
            elif name.startswith(("decoder.final", "output_layer.", "value_head.")):
                wanted = last
            else:
                wanted = first
            if wanted:
                held.append(_held(row, shape, model, parallel.tp, alone=shared and name == _EMBEDDING))
        if shared and last:  # the last stage's copy of the embedding stands where the head would
            embedding = next(row for row in found if row.megatron == _EMBEDDING)
            held.append(_held(embedding, shape, model, parallel.tp, alone=True))
        parts.append(held)
    return parts


@lru_cache(maxsize=8)
def _ordered(shape: ModelShape, critic: bool) -> list[Row]:
    return sorted(rows(shape, critic), key=_place)


def _place(row: Row) -> tuple[int, ...]:
    """Sorts rows as the modules register their parameters."""
    name = row.megatron
    order = next(i for i, prefix in enumerate(_ORDER) if name.startswith(prefix))
    layer = int(name.split(".")[2]) if ".layers." in name else -1
    inside = next((i for i, module in enumerate(_WITHIN_LAYER) if module in name), -1)
    inner = next(i for i, end in enumerate(_WITHIN_MODULE) if name.endswith(end))
    if "patch_embed" in name:
        group = 0
    else:
        group = 2 if "merger" in name else 1
    return order, group, layer, inside, (2, 1, 0)[inner]


def _held(row: Row, shape: ModelShape, model: ModelConfig, tp: int, alone: bool) -> Parameter:
    numbers = _numbers(row)
    if row.kind == "vocabulary":
        numbers = padded_vocab(shape, tp) * row.sizes[0][1]
    if cut_dim(row) is not None:
        numbers //= tp
    return Parameter(row.megatron, numbers, not is_frozen(row.megatron, model), alone)


def buckets(parameters: Sequence[Parameter], parallel: ParallelConfig, dp: int, first: bool) -> Iterator[Bucket]:
    """Buckets of the gradient buffer of one part.

    Args:
        parameters: of the part, trained or not.
        parallel: layout.
        dp: data-parallel replicas.
        first: the first part of the first stage, the only one whose buffer is cut for overlap.
    """
    padded = parallel.distributed_optimizer
    most = max(_BUCKET_NUMBERS, _BUCKET_NUMBERS_PER_RANK * dp) if parallel.overlap and first else None
    unit = math.lcm(dp * parallel.cp, _BUCKET_START)
    spans: list[tuple[int, int]] = []
    end = 0

    def close() -> Bucket:
        return Bucket(_up(end, unit) if padded else end, tuple(spans))

    for parameter in reversed(parameters):
        if not parameter.trained:
            continue
        alone = parameter.alone and padded
        if alone and spans:
            yield close()
            spans, end = [], 0
        start = _up(end, _PARAMETER_START) if padded else end
        end = start + parameter.numbers
        spans.append((start, end))
        if alone or (most is not None and end >= most):
            yield close()
            spans, end = [], 0
    if spans:
        yield close()


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def model_state(
    shape: ModelShape,
    model: ModelConfig,
    parallel: ParallelConfig,
    dp: int,
    stage: int = 0,
    optimizer_rank: int = 0,
    critic: bool = False,
) -> ModelState:
    """Bytes that one rank holds of a model and its optimizer between steps.

    Args:
        shape: sizes.
        model: number format and what trains.
        parallel: layout, checked by `check_layout`.
        dp: data-parallel replicas.
        stage: pipeline stage of the rank.
        optimizer_rank: its number among the ``dp x cp`` ranks that share an optimizer.
        critic: a value head in place of the language-model head.
    """
    ranks, width = dp * parallel.cp, DTYPE_BYTES[model.dtype]
    held = weights = buffered = owned = trained = 0
    for number, part in enumerate(rank_parameters(shape, model, parallel, critic, stage)):
        here = sum(p.numbers for p in part if p.trained)
        cut = list(buckets(part, parallel, dp, stage == 0 and number == 0))
        size = sum(bucket.numbers for bucket in cut)
        held += sum(p.numbers for p in part)
        trained += here
        buffered += size
        weights += sum(p.numbers for p in part if not p.trained) + size
        if parallel.distributed_optimizer:
            owned += sum(bucket.owned(optimizer_rank, ranks) for bucket in cut)
        else:
            owned += here
    return ModelState(
        parameters=held,
        trained=trained,
        weights=weights * width,
        gradients=buffered * GRADIENT_BYTES,
        optimizer=owned * (MOMENT_BYTES + MASTER_BYTES[model.dtype]),
    )
