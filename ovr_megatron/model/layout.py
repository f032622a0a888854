"""Which layouts a model's sizes allow, and what the rows of its packs must be a multiple of.  No torch."""

from __future__ import annotations

import math

from ovr_megatron.config import ConfigError, ParallelConfig
from ovr_megatron.families import ModelShape


def check_layout(shape: ModelShape, parallel: ParallelConfig, fp8: bool = False) -> None:
    """Refuse a layout that the model's sizes do not allow, before anything is allocated.

    FP8 matrix products want both sizes of a rank's weight to be multiples of 16.

    Raises:
        ConfigError: names the values and the nearest that fit.
    """
    tp = parallel.tp
    counts = {
        "key-value heads": shape.kv_heads,
        "attention heads": shape.heads,
        "vision heads": shape.vision.heads,
        "FFN columns": shape.ffn,
        "vision FFN columns": shape.vision.ffn,
    }
    for name, count in counts.items():
        if count % tp:
            # The remedy must divide all of the counts, not this one alone.
            divisor = math.gcd(*counts.values())
            tp_sizes = [size for size in range(1, tp) if divisor % size == 0]
            raise ConfigError(
                f"parallel.tp={tp} does not divide the model's {count} {name}; use at most tp={tp_sizes[-1]}"
            )
    _check_stages(shape, parallel)
    _check_layer_features(shape, parallel)
    if fp8:
        _check_fp8_sizes(shape, tp)


def _check_layer_features(shape: ModelShape, parallel: ParallelConfig) -> None:
    """Refuse a pipeline whose first part lacks a layer that features of the vision tower are added to."""
    needed = shape.vision.layer_features
    stage = parallel.first_stage_layers
    if not stage:
        # As `_check_stages` divides them.
        uneven = bool(parallel.last_stage_layers)
        stage = (shape.layers - parallel.last_stage_layers) // (parallel.pp - uneven)
    layers = stage // parallel.vpp
    if layers < needed:
        raise ConfigError(
            f"parallel.pp={parallel.pp}, parallel.vpp={parallel.vpp}: the vision tower's features are added to the "
            f"first {needed} layers, and the first part of the first stage has {layers}; "
            f"{_pipeline_remedy(shape, parallel.vpp)}"
        )


def _pipeline_remedy(shape: ModelShape, vpp: int) -> str:
    """Return the values of ``parallel.pp`` that stages of equal size allow with this ``vpp``."""
    needed = shape.vision.layer_features
    pp_sizes = []
    # An interleaved pipeline has at least two stages.
    for size in range(1 if vpp == 1 else 2, shape.layers + 1):
        parts = size * vpp
        if shape.layers % parts == 0 and shape.layers // parts >= needed:
            pp_sizes.append(str(size))
    if not pp_sizes:
        return "lower vpp"
    return f"without uneven stages pp can be {', '.join(pp_sizes)}"


def _check_fp8_sizes(shape: ModelShape, tp: int) -> None:
    sizes = {
        "width": shape.hidden,
        "FFN columns a rank": shape.ffn // tp,
        "query columns a rank": shape.heads * shape.head_dim // tp,
        "key columns a rank": shape.kv_heads * shape.head_dim // tp,
    }
    for name, size in sizes.items():
        if size % 16:
            tp_sizes = []
            for divisor in range(1, tp):
                divisor_size = size * tp // divisor
                if tp % divisor == 0 and divisor_size % 16 == 0:
                    tp_sizes.append(divisor)
            remedy = "use model.fp8=none"
            if tp_sizes:
                remedy = f"use tp={tp_sizes[-1]} or model.fp8=none"
            raise ConfigError(f"model.fp8 with parallel.tp={tp}: {name} = {size}, not a multiple of 16; {remedy}")


def _check_stages(shape: ModelShape, parallel: ParallelConfig) -> None:
    """Refuse stages and interleaved parts that the model's layers do not divide over."""
    layers = shape.layers
    first = parallel.first_stage_layers
    last = parallel.last_stage_layers
    uneven = [count for count in (first, last) if count]
    even_layers = layers - sum(uneven)
    even_stages = parallel.pp - len(uneven)
    settings = f"parallel.pp={parallel.pp}, parallel.vpp={parallel.vpp}"
    if uneven:
        settings += f" with {first or '-'} first and {last or '-'} last layers"
    if even_stages == 0 and even_layers:
        raise ConfigError(
            f"{settings}: these stages hold {sum(uneven)} layers and the model has {layers}; make them its sum"
        )
    even_parts = even_stages * parallel.vpp
    # Too few layers may divide, too: 0 layers leave stages without any.
    if even_stages and (even_layers < even_stages or even_layers % even_parts):
        raise ConfigError(
            f"{settings}: {even_layers} of the model's {layers} layers do not divide over {even_stages} stages x "
            f"{parallel.vpp}; {_pipeline_remedy(shape, parallel.vpp)}"
        )
    for count in uneven:
        if count % parallel.vpp:
            raise ConfigError(f"{settings}: {count} layers do not divide by vpp; use a multiple of {parallel.vpp}")


# A rank's rows must be a multiple of this for an FP8 recipe's matrix products: 16 for their operands, and full blocks
# for block scaling.  Transformer Engine gathers the input of a sequence-parallel layer in FP8 only where every rank
# has full blocks (`Float8BlockQuantizer.is_quantizable`); before 2.14 it refused others, now it gathers bfloat16.
_FP8_ROWS = {"none": 1, "delayed": 16, "current": 16, "block": 128}


def alignment(parallel: ParallelConfig, fp8: str = "none") -> tuple[int, int]:
    """Return what the rows of every document, and of every pack, must be a multiple of.

    Context parallelism cuts a document into two chunks a rank; all ranks of a sequence-parallel group hold equally
    many rows; FP8 matrix products need a multiple of rows that follows from the recipe.

    Args:
        parallel: the model's layout.
        fp8: ``model.fp8``, the scaling recipe.
    """
    document = 2 * parallel.cp if parallel.cp > 1 else 1
    ranks = parallel.cp
    if parallel.sequence_parallel:
        ranks *= parallel.tp
    pack = math.lcm(document, ranks * _FP8_ROWS[fp8])
    return document, pack
