"""Parameters of one rank and the bytes that they, their gradients and their optimizer state take: exact, no estimate.

The rules are those of Megatron-Core 0.16.1 (`distributed/param_and_grad_buffer.py`, `optimizer/distrib_optimizer.py`):
float32 gradients lie in contiguous buffers cut into buckets; the distributed optimizer pads every parameter's start to
64 elements and every bucket to a multiple of its ranks and of 128, and a rank owns an equal slice of every bucket.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType

from ovr_megatron.config import LoraConfig, ModelConfig, ParallelConfig
from ovr_megatron.engine import is_frozen
from ovr_megatron.families import ModelShape
from ovr_megatron.weights.adapters import adapter_rows
from ovr_megatron.weights.table import TensorRow, cut_dim, padded_vocab, rows

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
GRADIENT_BYTES = 4  # the engine reduces gradients in float32
MOMENT_BYTES = 8  # Adam's two moments in float32
MASTER_BYTES = {"float32": 0, "bfloat16": 4}
_PARAMETER_ALIGNMENT = 64  # elements
_BUCKET_ALIGNMENT = 128
_BUCKET_NUMEL = 40_000_000
_BUCKET_NUMEL_PER_RANK = 1_000_000
# Modules register their parameters in this order; buffers are filled from the last to the first.
_ORDER = ("embedding.", "decoder.layers.", "decoder.final_layernorm.", "output_layer.", "vision.", "value_head.")
_WITHIN_TOWER = ("vision.patch_embed.", "vision.pos_embed.", "vision.layers.", "vision.merger.")
_WITHIN_LAYER = ("linear_proj.", "linear_qkv.", "q_layernorm.", "k_layernorm.", "linear_fc1.", "linear_fc2.")
_WITHIN_MODULE = (".weight", ".bias", ".layer_norm_weight", ".layer_norm_bias", ".lora_A", ".lora_B")
_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Parameter:
    """One parameter as a rank holds it; ``own_bucket``: Megatron gives it a bucket of its own."""

    name: str
    numel: int
    trained: bool
    own_bucket: bool = False


@dataclass(frozen=True)
class Bucket:
    """A slice of a gradient buffer: its elements with padding, and where the parameters in it begin and end."""

    numel: int
    spans: tuple[tuple[int, int], ...]

    def owned(self, rank: int, ranks: int) -> int:
        """Count the elements of parameters, without padding, in the slice of optimizer ``rank`` of ``ranks``."""
        size = self.numel // ranks
        slice_start = rank * size
        slice_end = slice_start + size
        owned = 0
        for start, end in self.spans:
            overlap = min(end, slice_end) - max(start, slice_start)
            owned += max(0, overlap)
        return owned


@dataclass(frozen=True)
class ModelState:
    """Bytes of a model on one rank between steps, and the number of its parameters there.

    ``weights`` includes the padding of the buffer that the distributed optimizer keeps them in, and ``frozen``, the
    weights that do not train.  ``optimizer`` is Adam's two moments and, beside bfloat16 weights, a float32 master copy;
    its step counters are not counted.
    """

    parameters: int
    trained: int
    weights: int
    frozen: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Return the bytes of weights, gradients and optimizer."""
        return self.weights + self.gradients + self.optimizer

    def without_frozen(self) -> ModelState:
        """Return the state of a model whose frozen weights are another model's memory."""
        return replace(self, weights=self.weights - self.frozen, frozen=0)


@lru_cache(maxsize=8)
def count_parameters(shape: ModelShape) -> Mapping[str, int]:
    """Count the parameters of the whole model by part; a tied head counts once, in the embedding."""
    counts = dict.fromkeys(("vision", "merger", "embedding", "layers", "head"), 0)
    for row in rows(shape):
        counts[_part_of_model(row.megatron)] += _count_elements(row)
    return MappingProxyType(counts)  # every caller has the same


def _part_of_model(name: str) -> str:
    if name.startswith("vision.merger."):
        return "merger"
    if name.startswith("vision."):
        return "vision"
    if name.startswith("embedding."):
        return "embedding"
    if name == "output_layer.weight":
        return "head"
    return "layers"


def _count_elements(row: TensorRow) -> int:
    return sum(math.prod(size) for size in row.sizes)


def stage_layers(layers: int, parallel: ParallelConfig) -> list[int]:
    """Count the language-model layers of each pipeline stage of a layout that `check_layout` accepts."""
    first = parallel.first_stage_layers
    last = parallel.last_stage_layers
    # A stage with a number of its own is left out; the others share what remains.
    even_stages = parallel.pp - bool(first) - bool(last)
    even_layers = layers - first - last
    layers_per_even_stage = 0
    if even_stages:
        layers_per_even_stage = even_layers // even_stages
    counts = [layers_per_even_stage] * parallel.pp
    if first:
        counts[0] = first
    if last:
        counts[-1] = last
    return counts


def rank_parameters(
    shape: ModelShape,
    model: ModelConfig,
    parallel: ParallelConfig,
    critic: bool,
    stage: int,
) -> list[list[Parameter]]:
    """Return the parameters of pipeline ``stage``, one list for each of its interleaved parts, in Megatron's order."""
    layers = stage_layers(shape.layers, parallel)[stage] // parallel.vpp
    ordered_rows = _ordered_rows(shape, critic, model.lora)
    shares_embedding = shape.tied and not critic and parallel.pp > 1
    last_stage = parallel.pp - 1
    last_part = parallel.vpp - 1
    parts = []
    for part_index in range(parallel.vpp):
        is_first = stage == 0 and part_index == 0
        is_last = stage == last_stage and part_index == last_part
        part: list[Parameter] = []
        for row in ordered_rows:
            if _is_in_part(row.megatron, layers, is_first, is_last):
                own_bucket = shares_embedding and row.megatron == _EMBEDDING
                part.append(_rank_parameter(row, shape, model, parallel.tp, own_bucket))
        if shares_embedding and is_last:  # the last stage's copy of the embedding stands where the head would
            embedding = next(row for row in ordered_rows if row.megatron == _EMBEDDING)
            part.append(_rank_parameter(embedding, shape, model, parallel.tp, own_bucket=True))
        parts.append(part)
    return parts


def _is_in_part(name: str, layers: int, is_first: bool, is_last: bool) -> bool:
    """Whether a part of ``layers`` layers has the parameter ``name``.

    Every part is described by the first layers of the model, since all layers have the same sizes.
    """
    if name.startswith("decoder.layers."):
        return int(name.split(".")[2]) < layers
    if name.startswith(("decoder.final", "output_layer.", "value_head.")):
        return is_last
    return is_first


# A search over layouts asks for the same models again and again.
@lru_cache(maxsize=8)
def _ordered_rows(shape: ModelShape, critic: bool, lora: LoraConfig) -> list[TensorRow]:
    table_rows = rows(shape, critic) + adapter_rows(shape, lora)
    return sorted(table_rows, key=_registration_order)


def _registration_order(row: TensorRow) -> tuple[int, ...]:
    """Return a key that sorts rows as the modules register their parameters."""
    name = row.megatron
    module = next(i for i, prefix in enumerate(_ORDER) if name.startswith(prefix))
    # Of a stack of layers or mergers; what is no part of one comes before.
    indices = [int(part) for part in name.split(".") if part.isdigit()]
    layer = indices[0] if indices else -1
    within_tower = next((i for i, part in enumerate(_WITHIN_TOWER) if name.startswith(part)), -1)
    within_layer = next((i for i, linear in enumerate(_WITHIN_LAYER) if linear in name), -1)
    within_module = next(i for i, end in enumerate(_WITHIN_MODULE) if name.endswith(end))
    return module, within_tower, layer, within_layer, within_module


def _rank_parameter(row: TensorRow, shape: ModelShape, model: ModelConfig, tp: int, own_bucket: bool) -> Parameter:
    """Return the tensor-parallel share of ``row``."""
    name = row.megatron
    numel = _count_elements(row)
    if row.kind == "vocabulary":
        width = row.sizes[0][1]
        numel = padded_vocab(shape, tp) * width
    if cut_dim(row) is not None:
        numel //= tp
    trained = not is_frozen(name, model)
    return Parameter(name, numel, trained, own_bucket)


def buckets(parameters: Sequence[Parameter], parallel: ParallelConfig, dp: int, first: bool) -> Iterator[Bucket]:
    """Cut the gradient buffer of one part into Megatron's buckets.

    Args:
        parameters: of the part, trained or not.
        parallel: layout.
        dp: data-parallel replicas.
        first: the first part of the first stage, the only one whose buffer is cut for overlap.
    """
    is_padded = parallel.distributed_optimizer
    limit = None
    if parallel.overlap and first:
        limit = max(_BUCKET_NUMEL, _BUCKET_NUMEL_PER_RANK * dp)
    optimizer_ranks = dp * parallel.cp
    bucket_unit = math.lcm(optimizer_ranks, _BUCKET_ALIGNMENT)
    spans: list[tuple[int, int]] = []
    end = 0

    def close_bucket() -> Bucket:
        numel = end
        if is_padded:
            numel = _round_up(end, bucket_unit)
        return Bucket(numel, tuple(spans))

    for parameter in reversed(parameters):
        if not parameter.trained:
            continue
        own_bucket = parameter.own_bucket and is_padded
        if own_bucket and spans:
            yield close_bucket()
            spans = []
            end = 0
        start = end
        if is_padded:
            start = _round_up(end, _PARAMETER_ALIGNMENT)
        end = start + parameter.numel
        spans.append((start, end))
        # A bucket ends with the parameter that fills it, which may reach beyond the limit.
        if own_bucket or (limit is not None and end >= limit):
            yield close_bucket()
            spans = []
            end = 0
    if spans:
        yield close_bucket()


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def model_state(
    shape: ModelShape,
    model: ModelConfig,
    parallel: ParallelConfig,
    dp: int,
    stage: int = 0,
    optimizer_rank: int = 0,
    critic: bool = False,
) -> ModelState:
    """Count the bytes of a model and its optimizer on one rank between steps.

    Args:
        shape: sizes.
        model: dtype and what trains.
        parallel: layout, checked by `check_layout`.
        dp: data-parallel replicas.
        stage: pipeline stage of the rank.
        optimizer_rank: rank among the ``dp x cp`` ranks that share an optimizer.
        critic: a value head in place of the language-model head.
    """
    # Recomputation changes no parameter: without it in the key, a search meets the same state three times as often.
    key_model = replace(model, recompute="none")
    return _count_state(shape, key_model, parallel, dp, stage, optimizer_rank, critic)


@lru_cache(maxsize=4096)
def _count_state(
    shape: ModelShape,
    model: ModelConfig,
    parallel: ParallelConfig,
    dp: int,
    stage: int,
    optimizer_rank: int,
    critic: bool,
) -> ModelState:
    optimizer_ranks = dp * parallel.cp
    parameters = 0
    trained = 0
    frozen = 0
    buffered = 0  # elements of the gradient buffers, padding included
    owned = 0  # elements that this rank's optimizer updates
    parts = rank_parameters(shape, model, parallel, critic, stage)
    for part_index, part in enumerate(parts):
        part_numel = 0
        part_trained = 0
        for parameter in part:
            part_numel += parameter.numel
            if parameter.trained:
                part_trained += parameter.numel
        is_first = stage == 0 and part_index == 0
        part_buckets = list(buckets(part, parallel, dp, is_first))
        parameters += part_numel
        trained += part_trained
        frozen += part_numel - part_trained
        buffered += sum(bucket.numel for bucket in part_buckets)
        if parallel.distributed_optimizer:
            owned += sum(bucket.owned(optimizer_rank, optimizer_ranks) for bucket in part_buckets)
        else:
            owned += part_trained
    return ModelState(
        parameters=parameters,
        trained=trained,
        weights=(frozen + buffered) * DTYPE_BYTES[model.dtype],
        frozen=frozen * DTYPE_BYTES[model.dtype],
        gradients=buffered * GRADIENT_BYTES,
        optimizer=owned * (MOMENT_BYTES + MASTER_BYTES[model.dtype]),
    )
