"""How long the samples are: measured on a finite part of the data, or what the recipe states."""

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
from ovr_megatron.model.shape import ModelShape

SAMPLE = 256


@dataclass(frozen=True)
class Workload:
    """Lengths of the samples.

    Attributes:
        tokens: Mean length of a sample; of a prompt where ``told`` is of prompts.
        squares: Sum of squared lengths over the sum of lengths: the length that attention sees.
        patches: Mean patches of a sample's images.
        told: Where the numbers come from.
    """

    tokens: float
    squares: float
    patches: float
    told: str


def measure(model_dir: str, data: DataConfig, seed: int, generation: bool, rows: int = SAMPLE) -> Workload:
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
    found = processor.lengths(drawn, generation)
    fitting = [(row, n) for row, n in zip(drawn, found, strict=True) if isinstance(n, int) and n <= data.pack_tokens]
    if not fitting:
        refused = next(n for n in found if not isinstance(n, int) or n > data.pack_tokens)
        raise (
            refused if isinstance(refused, Exception) else ValueError(f"no sample fits into {data.pack_tokens} tokens")
        )
    lengths = [length for _, length in fitting]
    patches = _patches([row for row, _ in fitting], processor, generation)
    told = f"{len(fitting)} of {len(drawn)} rows measured" + (" (prompts)" if generation else "")
    return Workload(
        tokens=sum(lengths) / len(lengths),
        squares=sum(n * n for n in lengths) / sum(lengths),
        patches=patches / len(lengths),
        told=told,
    )


def of_tokenised(folder: str, limit: int) -> tuple[Workload, float]:
    """The samples of a tokenised set that fit into ``limit`` tokens, and how many an epoch has of them.

    Raises:
        RowError: the folder is no tokenised set.
    """
    manifest, records = read_tokenised_manifest(folder), read_records(folder)
    fitting = records[records["length"] <= limit]
    lengths = fitting["length"].astype(np.float64)
    weights = np.array([source.weight for source in manifest.sources])[fitting["source"]]
    total = float((weights * lengths).sum())
    told = f"all {len(fitting):,} samples of the set"
    count = float(weights.sum())
    return Workload(total / count, float((weights * lengths**2).sum()) / total, 0.0, told), count


def _patches(rows: Sequence[Row], processor: Processor, generation: bool) -> int:
    """Patches of all images of ``rows``; pixels are processed, a few rows at a time."""
    pictured = [r for r in rows if any(not isinstance(part, TextPart) for m in r.prompt for part in m.parts)]
    total = 0
    for start in range(0, len(pictured), 16):
        total += sum(len(sample.patches) for sample in processor.encode(pictured[start : start + 16], generation))
    return total


def stated(tokens: int, limit: int, patches: float = 0.0) -> Workload:
    """Samples of which only the mean length is known: as if lengths fell off exponentially, up to ``limit``."""
    return Workload(tokens, min(2.0 * tokens, float(limit)), patches, f"stated mean of {tokens:,} tokens")


def image_patches(data: DataConfig, shape: ModelShape, share: float = 0.25) -> float:
    """Patches of an image of ``share`` of the image budget."""
    return share * data.max_pixels / shape.vision.patch**2
