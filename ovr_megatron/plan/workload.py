"""Lengths of the samples: measured on a finite part of the data, or assumed from the mean that the recipe states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from ovr_megatron.config import DataConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.schema import Row, TextPart
from ovr_megatron.data.stream import open_stream
from ovr_megatron.data.tokenised import read_records, read_tokenised_manifest
from ovr_megatron.families import ModelShape

SAMPLE_ROWS = 256
_ENCODED_ROWS = 16  # rows whose pixels are processed at once


@dataclass(frozen=True)
class Workload:
    """Lengths of the samples.

    Attributes:
        tokens: Mean length of a sample; of a prompt where ``basis`` is of prompts.
        squares: Sum of squared lengths over the sum of lengths: the length that attention sees.
        patches: Mean patches of a sample's images.
        basis: Where the figures come from, in words.
    """

    tokens: float
    squares: float
    patches: float
    basis: str


def measure(model_dir: str, data: DataConfig, seed: int, generation: bool, rows: int = SAMPLE_ROWS) -> Workload:
    """Draw ``rows`` rows of the sources and measure them with the model's own tokenizer and image processor.

    Args:
        model_dir: Hugging Face folder.
        data: sources and limits; rows over a limit are left out, as in training.
        seed: of the stream.
        generation: prompts alone, or whole samples.
        rows: how many.

    Raises:
        ConfigError: there is no source, or none of the rows is within the limits.
        RowError: a row cannot be used.
    """
    processor = Processor(model_dir, data)
    drawn = list(islice(open_stream(data, seed), rows))
    results = processor.lengths(drawn, generation)
    fitting: list[Row] = []
    lengths: list[int] = []
    refusals: list[int | Exception] = []  # an error, or a length over the limit
    for row, result in zip(drawn, results, strict=True):
        if isinstance(result, int) and result <= data.pack_tokens:
            fitting.append(row)
            lengths.append(result)
        else:
            refusals.append(result)
    if not fitting:
        reason = refusals[0]
        if isinstance(reason, Exception):
            raise reason
        raise ValueError(f"no sample fits into {data.pack_tokens} tokens")
    basis = f"{len(fitting)} of {len(drawn)} rows measured"
    if generation:
        basis += " (prompts)"
    samples = len(lengths)
    tokens = sum(lengths)
    squares = sum(length * length for length in lengths)
    patches = _count_patches(fitting, processor, generation)
    return Workload(
        tokens=tokens / samples,
        squares=squares / tokens,
        patches=patches / samples,
        basis=basis,
    )


def read_tokenised_workload(folder: str, limit: int) -> tuple[Workload, float]:
    """Return the lengths of a tokenised set's samples that fit into ``limit`` tokens, and how many an epoch draws.

    A sample counts as often as its source's weight says.

    Raises:
        RowError: the folder is no tokenised set.
    """
    manifest = read_tokenised_manifest(folder)
    records = read_records(folder)
    is_fitting = records["length"] <= limit
    fitting = records[is_fitting]
    # As int32, in which they are stored, squares of long samples would overflow.
    lengths = fitting["length"].astype(np.float64)
    source_weights = np.array([source.weight for source in manifest.sources])
    weights = source_weights[fitting["source"]]
    tokens = float((weights * lengths).sum())
    squares = float((weights * lengths**2).sum())
    samples = float(weights.sum())
    workload = Workload(
        tokens=tokens / samples,
        squares=squares / tokens,
        patches=0.0,
        basis=f"all {len(fitting):,} samples of the set",
    )
    return workload, samples


def _count_patches(rows: Sequence[Row], processor: Processor, generation: bool) -> int:
    """Count the patches of all images of ``rows``; pixels are processed, a few rows at a time."""
    with_images = [row for row in rows if _has_image(row)]
    patches = 0
    # Pixels of all rows at once might not fit into memory.
    for start in range(0, len(with_images), _ENCODED_ROWS):
        encoded_rows = with_images[start : start + _ENCODED_ROWS]
        samples = processor.encode(encoded_rows, generation)
        patches += sum(len(sample.patches) for sample in samples)
    return patches


def _has_image(row: Row) -> bool:
    for message in row.prompt:
        for part in message.parts:
            if not isinstance(part, TextPart):
                return True
    return False


def assume_workload(tokens: int, limit: int, patches: float = 0.0) -> Workload:
    """Return lengths of a mean of ``tokens``, as if they fell off exponentially, up to ``limit``."""
    # The mean square of an exponential distribution is twice the square of its mean.
    squares = min(2.0 * tokens, float(limit))
    return Workload(
        tokens=tokens,
        squares=squares,
        patches=patches,
        basis=f"stated mean of {tokens:,} tokens",
    )


def image_patches(data: DataConfig, shape: ModelShape, share: float = 0.25) -> float:
    """Return the patches of an image of ``share`` of the image budget."""
    patch_pixels = shape.vision.patch**2
    return share * data.max_pixels / patch_pixels
